"""Folders of models."""

import json

import pytest
from helpers.hf_folders import model_of
from helpers.reference_cases import load
from safetensors.numpy import save_file

from based_jax.convert import save_hf


@pytest.fixture
def folder(tmp_path):
    """Return a saved folder, its fields and its weights."""
    save_hf(model_of("based"), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def llama(tmp_path):
    """Return the folder of a Llama."""
    case = load("hf_llama_a")
    save_file(case.weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(case.meta["config"] | {"model_type": "llama"}))
    return tmp_path
