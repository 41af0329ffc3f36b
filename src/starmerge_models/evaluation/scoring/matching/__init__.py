r"""Matchers: parse the answer from a model's response, and give the row a credit.

A task names its matcher in ``match``, a name of :data:`MATCHERS`. With a closed set of labels, each
of which has several words:

- ``whole-word``: the label that occurs first in the response, the longest if two start at the same
  place. Only whole words count: "no" does not occur in "know" or "not", "acceptable" not in
  "unacceptable", ``pair_conn`` not in ``pair_conn_anaphora``; the same for numbers: 1 does not
  occur in 10, 1.5 or -1.
- ``starts-with``: the same, at the start of the response, after any brackets, quotes and asterisks.
- ``exact``: the response is a label's word, except for quotes around it and punctuation at its end.

Without labels:

- ``contains``: the right answer occurs in the response, as whole words.
- ``exact``: the response is the right answer, as above.
- ``number``: the first number. A number outside the task's range is not an answer.
- ``token-f1``: F1 of the tokens that response and right answer share, as SQuAD counts them
  (arXiv 1606.05250, its evaluation script 1.1): without case, ASCII punctuation and articles.

All whitespace is equivalent, 12,345 equals 12345, and case counts only if the task says so.

**Negation.** A label directly after "not", "no", "never", "neither", "n't" or a similar word is not
the response's answer ("does not entail", "not an acceptable sentence"), and any other answer would
be a guess. So a response whose first label is negated is unreadable, unless the label includes the
negation ("not plausible"); a right answer that occurs only negated is not contained. Subtler
negations ("hardly acceptable") are not detected.
"""

from starmerge_models.evaluation.scoring.matching.custom import matcher as matcher
from starmerge_models.evaluation.scoring.matching.labels import StartsWith, WholeWord
from starmerge_models.evaluation.scoring.matching.matcher import MATCHERS as MATCHERS
from starmerge_models.evaluation.scoring.matching.matcher import Matcher as Matcher
from starmerge_models.evaluation.scoring.matching.matcher import Mode as Mode
from starmerge_models.evaluation.scoring.matching.matcher import Reading as Reading
from starmerge_models.evaluation.scoring.matching.matcher import Rules as Rules
from starmerge_models.evaluation.scoring.matching.matcher import is_final as is_final
from starmerge_models.evaluation.scoring.matching.matcher import read as read
from starmerge_models.evaluation.scoring.matching.numbers import Number
from starmerge_models.evaluation.scoring.matching.texts import Contains, Exact, TokenF1

for _own in (WholeWord(), StartsWith(), Exact(), Contains(), Number(), TokenF1()):
    MATCHERS.add(_own.name, _own)
