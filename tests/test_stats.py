"""What ``nc_stats`` says of block prefill: the estimated dropped mass against the true one, and when it is there."""

import copy
import pickle

import pytest
import torch
from tiny_models import tiny_model

from nc_patch import nc_stats, patch_model
from nc_patch.stats import LayerCounters, summary
