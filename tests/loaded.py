"""What commands import or read late, all at once: for the process whose forks run them."""

import importlib

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

for _name in (
    *("peft", "pandas", "scipy.stats", "lemminflect", "pyarrow.parquet", "gguf"),
    *("transformers.models.llama.modeling_llama", "transformers.tokenization_utils_tokenizers"),
    *("starmerge_models.study.execute", "starmerge_models.study.outputs"),
    *("starmerge_models.evaluation.runner", "starmerge_models.study.choose"),
    *("starmerge_models.study.inspection.run", "starmerge_models.study.page.evaluation"),
    *("starmerge_models.study.suite", "starmerge_models.study.inspection_files"),
    *("starmerge_models.calibration.run", "starmerge_models.training.finetuning"),
):
    importlib.import_module(_name)
get_checkpoint_conversion_mapping("llama")  # the first call makes those of all models
