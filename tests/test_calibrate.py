"""Calibration of whole models: what it finds, what it leaves as it was, and how it goes on and is shared."""

import numpy as np
import pytest
import torch
from processes import start_call
from profiles import measured_profile
from tiny_models import FAMILIES, VOCABULARY, random_ids, tiny_model
from tiny_sweep import tiny_text, tiny_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from eval_tasks.launch import free_port
from nc_patch import (
    NCConfig,
    ProfileError,
    UnsupportedModelError,
    calibrate,
    is_patched,
    nc_stats,
    patch_model,
    recording,
)
from nc_patch import calibrate as calibrate_function
from nc_patch.calibrate import cut_pieces
from nc_patch.recording import Plan, measure_piece, piece_name

LENGTHS = (32, 64, 128)
QUIET = {"rows": 6, "progress": False}


def state_of(model) -> tuple:
    """Everything of a model that calibration might leave changed."""
    modes = [module.training for module in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    gradients = [(p.requires_grad, p.grad) for p in model.parameters()]
    return modes, hooks, gradients, model.config._attn_implementation, is_patched(model), model.config.to_json_string()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_eager_attention(family):
    model, ids = tiny_model(family, num_hidden_layers=2), random_ids(128)
    plan = Plan(LENGTHS, 6, (0.05, 0.2))
    piece = measure_piece(model, ids.tolist(), plan)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids[None], output_attentions=True).attentions
    for level, length in enumerate(LENGTHS):
        rows = plan.positions(length)
        for layer, attention in enumerate(attentions):
            weights = attention[0][:, rows, : attention.shape[-1]].double()
            weights = weights / weights.sum(-1, keepdim=True)  # a learned sink takes its part
            assert piece.visible[level, layer].tolist() == (weights[0] > 0).sum(-1).tolist()
            mass = weights.sort(-1, descending=True).values.cumsum(-1)
            for number, eps in enumerate(plan.eps):
                fewest, most = ((mass < 1 - eps + slack).sum(-1) + 1 for slack in (-1e-4, 1e-4))
                found = torch.from_numpy(piece.support[number, level, layer])
                assert ((found >= fewest) & (found <= most)).all()


def test_the_predicted_loss_is_that_of_the_fisher_information():
    # A nudge of one head's output at one row changes the distribution of every later token; half the gradient's square
    # along the nudge, over tokens that the model draws, is the divergence from what it was.
    model, ids = tiny_model("llama", num_hidden_layers=1), random_ids(1, 32)
    gradients = []

    def nudged(size: float, direction: torch.Tensor) -> torch.Tensor:
        from nc_patch.patch import observed

        def nudge(call):
            call.output[:, 1, 20] += size * direction

        with observed(model, nudge), torch.no_grad():
            return torch.log_softmax(model(ids).logits[0].double(), -1)

    direction = torch.randn(16)
    before, after = nudged(0.0, direction), nudged(0.05, direction)
    divergence = float((before.exp() * (before - after)).sum()) / 0.05**2

    from nc_patch.patch import observed

    for seed in range(60):

        def keep(call):
            call.output.register_hook(lambda g: gradients.append(float(g[0, 1, 20] @ direction)))

        with observed(model, keep), recording._evaluating(model), recording._from_embeddings(model):
            recording._loss_of_drawn_tokens(model(ids).logits, seed).backward()
    assert np.mean(np.square(gradients)) / 2 == pytest.approx(divergence, rel=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_calibrated_and_left_as_it_was(family):
    model, ids = tiny_model(family), random_ids(1, 60)
    model.train()
    model.model.layers[1].eval()
    before, logits = state_of(model), model.eval()(ids).logits
    model.train()
    model.model.layers[1].eval()
    profile = calibrate(model, None, [random_ids(300).tolist()], LENGTHS, pieces=2, **QUIET)
    assert state_of(model) == before
    assert torch.equal(model.eval()(ids).logits, logits)
    windows = {"mistral": (11, 11, 11), "gemma2": (9, 0, 9), "gpt_oss": (7, 0, 7)}
    assert profile.windows == windows.get(family, (0, 0, 0))
    assert profile.alpha.shape == (3, 4)
    assert [fit.eps for fit in profile.fits] == [0.02, 0.05, 0.1, 0.2]
    assert (profile.sensitivity >= 0).all()
    assert profile.sensitivity.max() > 0


def test_a_patched_model_is_calibrated_densely_and_keeps_its_patch():
    model = tiny_model("llama")
    patch_model(model, 2.0, 0.0)
    profile = calibrate(model, None, [random_ids(300).tolist()], LENGTHS, pieces=2, seed=0, **QUIET)
    torch.manual_seed(0)
    assert is_patched(model)
    assert nc_stats(model)["attended_fraction"] is None  # nothing ran under the patch that is back
    ids = random_ids(1, 40)
    model(ids)
    assert nc_stats(model)["mean_keys"] < 2.1
    assert profile.kept.max() <= 1.0


@pytest.mark.parametrize("failure", ["dense", "gradient"])
def test_the_model_is_restored_when_a_pass_fails(monkeypatch, failure):
    model = tiny_model("llama")
    before = state_of(model)
    real = recording.row_curves
    calls = []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == (2 if failure == "dense" else 3 * 3 + 2):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(recording, "row_curves", fail)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, None, [random_ids(300).tolist()], LENGTHS, pieces=1, **QUIET)
    assert state_of(model) == before


def test_it_goes_on_with_the_pieces_that_were_finished(tmp_path, monkeypatch):
    model, text = tiny_model("llama"), random_ids(500).tolist()
    whole = calibrate(model, None, [text], LENGTHS, pieces=3, **QUIET)
    real, measured = recording.measure_piece, []

    def one_then_killed(*arguments):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(1)
        return real(*arguments)

    import nc_patch.calibrate  # noqa: F401  the module, which the function of the same name hides

    module = __import__("sys").modules["nc_patch.calibrate"]
    monkeypatch.setattr(module, "measure_piece", one_then_killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, None, [text], LENGTHS, pieces=3, directory=tmp_path, **QUIET)
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".piece-torn").write_bytes(b"half of a piece")

    def count(*arguments):
        measured.append(1)
        return real(*arguments)

    monkeypatch.setattr(module, "measure_piece", count)
    assert calibrate(model, None, [text], LENGTHS, pieces=3, directory=tmp_path, **QUIET) == whole
    assert len(measured) == 3
    assert calibrate(model, None, [text], LENGTHS, pieces=3, directory=tmp_path, **QUIET) == whole
    assert len(measured) == 3
    calibrate(model, None, [text], LENGTHS, pieces=3, directory=tmp_path, rows=7, progress=False)
    assert len(measured) == 6  # another plan takes nothing from them


def test_a_damaged_piece_is_named(tmp_path):
    model, text = tiny_model("llama"), random_ids(130).tolist()
    calibrate(model, None, [text], LENGTHS, pieces=1, directory=tmp_path, **QUIET)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    for damaged in (b"", b"no archive", content[: len(content) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(ProfileError, match=f"{file.name} is damaged"):
            calibrate(model, None, [text], LENGTHS, pieces=1, directory=tmp_path, **QUIET)


def _one_rank(rank: int, directory: str, fails: bool) -> None:
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(7)
    text = torch.randint(1, VOCABULARY, (600,)).tolist()
    if fails and rank == 1:
        recording.row_curves = None
    try:
        profile = calibrate(tiny_model("llama"), None, [text], LENGTHS, pieces=3, **QUIET)
        profile.save(f"{directory}/rank{rank}.json")
    except (ProfileError, TypeError) as error:
        with open(f"{directory}/error{rank}", "w", encoding="utf-8") as file:
            file.write(str(error))
    torch.distributed.destroy_process_group()


def run_ranks(directory, fails: bool = False) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        start_call(_one_rank, rank, str(directory), fails, said=directory / f"said{rank}", RANK=str(rank), **shared)
        for rank in range(2)
    ]
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0], (directory / "said0").read_text()


def test_two_processes_find_what_one_does(tmp_path):
    from nc_patch import Profile

    torch.manual_seed(7)
    text = torch.randint(1, VOCABULARY, (600,)).tolist()
    alone = calibrate(tiny_model("llama"), None, [text], LENGTHS, pieces=3, **QUIET)
    run_ranks(tmp_path)
    assert Profile.load(tmp_path / "rank0.json") == Profile.load(tmp_path / "rank1.json") == alone


def test_when_one_process_fails_the_other_says_so_and_ends(tmp_path):
    run_ranks(tmp_path, fails=True)
    assert "process 1: TypeError" in (tmp_path / "error0").read_text()
    assert "not callable" in (tmp_path / "error1").read_text()


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and "expand" not in str(function):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_nothing_of_the_size_of_the_score_matrix_is_made():
    model = tiny_model("llama", max_position_embeddings=2048)
    with LargestTensor() as largest:
        measure_piece(model, random_ids(1024).tolist(), Plan((64, 1024), 4, (0.1,)))
    assert largest.elements < 1024 * 1024 / 4


def test_texts_are_cut_evenly_and_do_not_overlap():
    tokenizer = tiny_tokenizer(bos=True)
    texts = [tiny_text(1000, 1), tiny_text(100, 2)]
    pieces = cut_pieces(tokenizer, texts, 50, 5)
    assert len(pieces) == 5
    assert all(len(piece) == 50 and piece[0] == tokenizer.bos_token_id for piece in pieces)
    bodies = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [bodies[0][start : start + 49] for start in (0, 490, 931)] == [piece[1:] for piece in pieces[:3]]
    assert [bodies[1][start : start + 49] for start in (0, 49)] == [piece[1:] for piece in pieces[3:]]
    assert cut_pieces(None, [list(range(100))], 50, 2) == [list(range(50)), list(range(50, 100))]


def test_the_same_tokens_as_text_and_as_ids_give_the_same_profile():
    model, tokenizer, text = tiny_model("llama"), tiny_tokenizer(), tiny_text(300)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    by_text, by_ids = (
        calibrate(model, t, [x], (32, 64), pieces=2, **QUIET) for t, x in ((tokenizer, text), (None, ids))
    )
    assert by_text == by_ids


IDS = list(range(1, 97)) * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, "there is no text"),
        ({"texts": "a text"}, "texts must be a list"),
        ({"texts": [""]}, "needs a tokenizer"),
        ({"texts": ["  "], "tokenizer": True}, "text 0 is empty"),
        ({"texts": [3]}, "text 0 is neither a text nor token ids"),
        ({"texts": [IDS[:100], IDS]}, "text 0 has 100 tokens, and the longest length is 128"),
        ({"texts": [IDS], "pieces": 9}, "the texts hold 3 pieces of 128 tokens, and 9 are asked for"),
        ({"lengths": [128]}, "at least two different lengths"),
        ({"lengths": [128, 128]}, "at least two different lengths"),
        ({"lengths": []}, "at least two different lengths"),
        ({"lengths": [8, 64]}, "lengths must be at least 16 tokens, got 8"),
        ({"lengths": [64, 4096]}, "beyond the 512 positions"),
        ({"lengths": 64}, "lengths must be a list"),
        ({"lengths": [64, 1.5]}, "lengths must be a list of numbers of tokens"),
        ({"target": 1.0}, "target must be a number in .0, 1., got 1.0"),
        ({"target": float("nan")}, "target must be a number"),
        ({"eps": (0.0,)}, "eps must be a number in .0, 1."),
        ({"pieces": 0}, "pieces must be a positive integer"),
        ({"rows": 0}, "rows must be a positive integer"),
        ({"dense_layers": (7,)}, "dense_layers names .7., the model has layers 0 to 2"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_before_any_work(arguments, message, monkeypatch):
    monkeypatch.setattr(recording, "row_curves", None)
    given = {"tokenizer": None, "texts": [IDS], "lengths": LENGTHS, "pieces": 1, **QUIET} | arguments
    if given["tokenizer"]:
        given["tokenizer"] = tiny_tokenizer()
    with pytest.raises(ProfileError, match=message):
        calibrate(tiny_model("llama"), **given)


def test_models_that_cannot_be_patched_or_give_nan_are_refused():
    with pytest.raises(UnsupportedModelError):
        calibrate(torch.nn.Linear(2, 2), None, [IDS], LENGTHS, **QUIET)
    model = tiny_model("llama")
    model.model.layers[1].self_attn.q_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ProfileError, match="holds NaN or Inf on this text"):
        calibrate(model, None, [IDS], LENGTHS, pieces=1, **QUIET)


def test_the_profile_says_what_it_was_made_of():
    profile = measured_profile()
    assert profile.lengths == (32, 64, 128, 256)
    assert profile.pieces == 2
    assert len(profile.texts) == 64
    assert profile.model_class == "LlamaForCausalLM"
    assert set(profile.versions) == {"nc_patch", "torch", "transformers", "python"}
    assert profile.aim == "95 % of every head's mass"
    assert calibrate_function is calibrate
    config = profile.config(tail="drop")
    assert isinstance(config, NCConfig)
    assert config.tail == "drop"


def test_pieces_are_named_by_weights_tokens_and_plan():
    plan = Plan((32, 64), 4, (0.1,))
    names = {
        piece_name("a", [1, 2], plan),
        piece_name("b", [1, 2], plan),
        piece_name("a", [1, 3], plan),
        piece_name("a", [1, 2], Plan((32, 64), 4, (0.2,))),
        piece_name("a", [1, 2], Plan((32, 64), 4, (0.1,), seed=1)),
    }
    assert len(names) == 5
    assert piece_name("a", np.array([1, 2]), plan) in names


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_shows_how_far_it_is(capsys, shown):
    calibrate(tiny_model("llama"), None, [IDS], (32, 64), pieces=1, rows=4, progress=shown)
    assert ("6/6" in capsys.readouterr().err) == shown
