"""What mergekit 0.1.5 makes of the recipes beside it, to compare with."""
