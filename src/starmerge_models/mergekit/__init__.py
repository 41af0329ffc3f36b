"""The dialect of mergekit: its recipes, translated into ours, and the method that runs them."""
