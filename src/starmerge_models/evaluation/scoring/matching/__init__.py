r"""Reading: which answer a model's response gives, and what that earns.

How a response is read is a task's ``match``, a name of :data:`MATCHERS`. With a closed set of
labels, each of which has several words:

- ``whole-word``: the label that stands first in the response, the longest where two start at one
  place. A word is a whole: "no" is not in "know" nor in "not", "acceptable" not in "unacceptable",
  ``pair_conn`` not in ``pair_conn_anaphora``; a number is one too: 1 is not in 10, 1.5 or -1.
- ``starts-with``: the same, where it opens the response; brackets, quotes and asterisks may stand
  before it.
- ``exact``: the response is a label's word, but for quotes around it and punctuation at its end.

Without labels:

- ``contains``: the right answer stands in the response, as whole words.
- ``exact``: the response is the right answer, as above.
- ``number``: the first number. One outside the task's range is no answer.
- ``token-f1``: F1 of the tokens that response and right answer share, as SQuAD counts them
  (arXiv 1606.05250, its evaluation script 1.1): without case, ASCII punctuation and articles.

Whitespace is all the same, 12,345 is 12345, and case counts only where the task says so.

**Negation.** A label straight after "not", "no", "never", "neither", "n't" or their like is not
what the response says ("does not entail", "not an acceptable sentence"), and what it says instead
would be a guess. So a response whose first label is negated is unreadable, unless negation and all
are a label ("not plausible"); a right answer that stands only negated is not contained. Subtler
turns ("hardly acceptable") are not seen.
"""

from starmerge_models.evaluation.scoring.matching.labels import StartsWith, WholeWord
from starmerge_models.evaluation.scoring.matching.matcher import MATCHERS as MATCHERS
from starmerge_models.evaluation.scoring.matching.matcher import Matcher as Matcher
from starmerge_models.evaluation.scoring.matching.matcher import Mode as Mode
from starmerge_models.evaluation.scoring.matching.matcher import Reading as Reading
from starmerge_models.evaluation.scoring.matching.matcher import Rules as Rules
from starmerge_models.evaluation.scoring.matching.matcher import is_final as is_final
from starmerge_models.evaluation.scoring.matching.matcher import read as read
from starmerge_models.evaluation.scoring.matching.numbers import Number
from starmerge_models.evaluation.scoring.matching.own import matcher as matcher
from starmerge_models.evaluation.scoring.matching.texts import Contains, Exact, TokenF1

for _own in (WholeWord(), StartsWith(), Exact(), Contains(), Number(), TokenF1()):
    MATCHERS.add(_own.name, _own)
