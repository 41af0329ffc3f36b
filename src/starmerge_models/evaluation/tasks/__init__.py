"""Tasks: their prompts, sources of rows and registry; suites of tasks."""

from starmerge_models.evaluation.tasks.bare_rows import task_of_rows as task_of_rows
from starmerge_models.evaluation.tasks.registry import TASKS as TASKS
from starmerge_models.evaluation.tasks.registry import all_rows_of as all_rows_of
from starmerge_models.evaluation.tasks.registry import find_task as find_task
from starmerge_models.evaluation.tasks.registry import folder_tasks as folder_tasks
from starmerge_models.evaluation.tasks.registry import task_of_prompts as task_of_prompts
from starmerge_models.evaluation.tasks.registry import with_rows_of as with_rows_of
