"""The lm-eval task ``nc_perplexity``: the same last tokens under a growing left context.

One document is one passage scored once per context length, so ``--limit N`` takes N passages at every length, and the
lengths are compared on the same tokens. Nothing here needs ``nc_patch``: any of lm-eval's models can run the task.
"""

import hashlib
import json
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import resolve_max_length
from transformers import AutoConfig, AutoTokenizer

from eval_tasks.lm_eval.options import ArgumentError

LENGTHS = (512, 1024, 2048, 4096)
SCORED_TOKENS = 256
DOCUMENTS = 24
