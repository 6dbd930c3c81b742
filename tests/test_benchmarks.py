"""The benchmarks of a step at toy size: they measure what they document. The values themselves mean nothing here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKL

ROOT = Path(__file__).parent.parent


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark; the folder is not an installed package and runs from the project's root."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def config_file(tmp_path):
    # 32 pixels: the smallest that the feature network and the baseline with 16-fold compression accept.
    model = {"sample_size": 32, "pca_size": 16, "pca_decode_size": 16}
    settings = tiny.tiny_settings(tmp_path, tmp_path, model=model)
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(settings))
    return str(file)


def test_the_parts_of_a_step_and_its_loop(benchmark, config_file, session, capsys):
    peak = benchmark("step")
    arguments = ["--config", config_file, "--batch", "2", "--rounds", "2", "--seconds", "0", "--json"]
    # Two networks, as in ultra.json; torchvision's AlexNet would have to be downloaded, which random weights avoid.
    two = ["--set", "loss.lpips_trunk=alexnet", "--set", "loss.lpips_crop_px=32"]
    assert peak.main([*arguments, *two, "--loop-steps", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    parts = result["parts"]
    assert list(parts) == [
        "encoder", "decoder", "encoder backward", "decoder backward", "target features", "reconstruction features",
        "features backward", "optimizer", "EMA weights", "step", "rest of the step",
    ]  # fmt: skip
    full = parts.pop("step")
    assert sum(row["seconds"] for row in parts.values()) == pytest.approx(full["seconds"])
    assert sum(row["fraction_of_step"] for row in parts.values()) == pytest.approx(1)
    assert full["gflop_per_image"] == pytest.approx(sum(row.get("gflop_per_image", 0) for row in parts.values()))
    best = result["peak_gflop_per_second"]["best"]
    for row in (full, parts["encoder"]):
        assert row["gflop_per_second"] == pytest.approx(2 * row["gflop_per_image"] / row["seconds"])
        assert row["fraction_of_peak"] == pytest.approx(row["gflop_per_second"] / best)
        assert row["fastest_seconds"] <= row["seconds"] <= row["slowest_seconds"]
    assert result["images_per_second"] == pytest.approx(2 / full["seconds"])
    names = [row["operation"] for row in result["top_operations"]]
    assert any("convolution" in name for name in names)
    assert 0 < result["loop"]["seconds_waiting"] <= result["loop"]["seconds_between_steps"]


def test_a_timed_round_changes_the_model_as_one_step_does(benchmark, config_file, session):
    """The real work is timed: gradients of the parts reach the weights, and the step changes them."""
    peak = benchmark("step")
    bench = peak.Bench(peak.load_config(config_file), 2, None)
    before = [parameter.detach().clone() for parameter in bench.parameters]
    peak._one_round(bench)
    assert bench.num_steps == 1
    assert any(not torch.equal(a, b) for a, b in zip(before, bench.parameters))
    assert all(parameter.grad is None for parameter in bench.parameters)
    frozen = bench.model.pca_branch.encoder.linear.weight
    assert not frozen.requires_grad and all(frozen is not parameter for parameter in bench.parameters)


def test_ours_beside_a_baseline(benchmark, config_file, session, capsys):
    compare = benchmark("compare_baseline")
    arguments = ["--config", config_file, "--models", "ours", "baseline_1024", "--batch", "1", "--rounds", "2"]
    arguments += ["--seconds", "0", "--min-steps", "1", "--peak-seconds", "0", "--json"]
    assert compare.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    ours, baseline = result["models"]["ours"], result["models"]["baseline_1024"]
    assert ours["steps"] == baseline["steps"] == 2
    assert ours["speedup"] == 1 and ours["speedup_range"] == [1, 1]
    # Below 1 GFLOP per image against 11: the order does not depend on the load of the machine.
    assert baseline["speedup"] > 1 and ours["images_per_second"] > baseline["images_per_second"]
    low, high = baseline["speedup_range"]
    assert low <= baseline["speedup"] <= high
    best = result["peak_gflop_per_second"]["best"]
    assert baseline["fraction_of_peak"] == pytest.approx(
        baseline["images_per_second"] * baseline["gflop_training"] / best
    )
    compare.print_table(result)
    assert "baseline_1024" in capsys.readouterr().out


def test_micro_batches_of_a_baseline_give_the_gradient_of_the_full_batch(benchmark, config_file, session):
    compare, peak = benchmark("compare_baseline"), benchmark("step")
    bench = peak.Bench(peak.load_config(config_file), 3, None)
    norms = []
    bench.accelerator.clip_grad_norm_ = lambda parameters, _: norms.append(
        torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    )
    for micro_batch in (3, 2):
        torch.manual_seed(0)
        step = compare.BaselineStep("baseline_1024", bench, micro_batch)
        passes = []
        step.model.encoder.register_forward_hook(lambda _, inputs, __, passes=passes: passes.append(len(inputs[0])))
        # Without posterior noise, the only thing that micro-batches sample differently.
        step.model.quant_conv.weight.data[4:] = 0
        step.model.quant_conv.bias.data[4:] = -30
        step.step()
        assert passes == ([3] if micro_batch == 3 else [2, 1])
    assert norms[1].item() == pytest.approx(norms[0].item(), rel=1e-4)


def test_the_baselines_are_those_that_people_use(benchmark):
    compare = benchmark("compare_baseline")
    sd, small = compare.count_baseline("baseline_sd", 256), compare.count_baseline("baseline_1024", 256)
    assert (sd["parameters"], sd["latent_dim"]) == (83_653_863, 4096)  # of the published weights
    assert small["latent_dim"] == 1024
    # VGG16's convolutions to relu5_3 at 256 pixels, by its widths; twice for two targets, twice for two
    # reconstructions, twice backward (the weights are frozen, so a backward pass costs one forward pass).
    widths = ((3, 64, 256), (64, 64, 256), (64, 128, 128), (128, 128, 128), (128, 256, 64), (256, 256, 64))
    widths += ((256, 256, 64), (256, 512, 32), (512, 512, 32), (512, 512, 32)) + ((512, 512, 16),) * 3
    vgg = sum(2 * 9 * a * b * size**2 for a, b, size in widths) / 1e9
    for cost in (sd, small):
        # A trained network costs three forward passes, less the gradient to the pixels, which is not computed.
        assert cost["gflop_training"] == pytest.approx(3 * cost["gflop_forward"] + 6 * vgg, rel=0.01)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("step", ["--batch", "0"], "--batch is 0: use at least 1"),
        ("step", ["--set", "loss.trunks=vgg16"], "unknown configuration key loss.trunks"),
        ("compare_baseline", ["--models", "baseline_sd"], "--models lacks ours"),
        ("compare_baseline", ["--min-steps", "0"], "--min-steps is 0: use at least 1"),
        ("compare_baseline", ["--micro-batch", "0"], "--micro-batch is 0: use at least 1"),
        ("compare_baseline", ["--trunk-weights", "/nowhere"], "'/nowhere', which is not a folder"),
    ],
)
def test_user_errors_exit_with_2(benchmark, config_file, session, capsys, name, arguments, message):
    if "--trunk-weights" in arguments:
        arguments = [*arguments, "--set", "loss.trunk=vgg16"]
    assert benchmark(name).main(["--config", config_file, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_baseline_is_trained_and_saved_at_the_given_times(benchmark, config_file, session, tmp_path, capsys):
    train_baseline = benchmark("train_baseline")
    arguments = ["--config", config_file, "--output", str(tmp_path / "baseline")]
    assert train_baseline.main([*arguments, "--minutes", "0.02", "0.00001"]) == 0
    early, late = capsys.readouterr().out.splitlines()
    assert "1e-05: " in early and " 1 steps" in early and "0.02: " in late
    first, last = (AutoencoderKL.from_pretrained(tmp_path / "baseline" / name) for name in ("1e-05", "0.02"))
    assert first.config.sample_size == 32 and first.config.latent_channels == 4
    moved = [not torch.equal(a, b) for a, b in zip(first.parameters(), last.parameters())]
    assert sum(moved) > 0.9 * len(moved)
    assert train_baseline.main([*arguments, "--minutes", "0"]) == 2
    assert capsys.readouterr().err == "error: --minutes [0.0]: use numbers above 0.\n"


def test_a_device_is_measured_in_one_command(benchmark, config_file, session, tmp_path, capsys):
    gpu = benchmark("gpu")
    file = tmp_path / "gpu.json"
    arguments = ["--config", config_file, "--small-config", config_file, "--batch", "2", "--steps", "1"]
    arguments += ["--loop-steps", "2", "--loss-steps", "2", "--loader-seconds", "0.1", "--no-compile"]
    assert gpu.main([*arguments, "--output", str(file)]) == 0
    table, result = capsys.readouterr().out, json.loads(file.read_text())
    assert list(result["steps"]) == ["bf16 eager", "no eager"]
    for name, row in result["steps"].items():
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"])
        assert 0 < row["fraction_of_roofline"] and 0 < row["estimated_memory_gib"] < 0.3
        assert f"| {name} |" in table
    assert result["loader"]["images_per_second"]["1 threads"] > 0
    assert result["resume"] == {"bitwise_equal": True, "files": 3, "different": []}
    assert len(result["losses"]["bf16"]) == len(result["losses"]["cpu"]) == 2
    assert result["losses"]["largest_relative_difference"]["bf16"] < 0.05
    assert "resume   bitwise equal" in table and "losses   within tolerance" in table


def test_a_part_that_fails_does_not_end_the_measurement(benchmark, session):
    gpu = benchmark("gpu")

    def fail() -> dict:
        raise RuntimeError("CUDA out of memory.\nmore")

    assert gpu.isolated(fail) == {"error": "RuntimeError: CUDA out of memory."}
    others = {name: {} for name in ("loader", "loop", "resume", "losses")}
    assert gpu.is_ok({"steps": {"bf16 eager": {"seconds": 0.1}}, **others})
    assert not gpu.is_ok({"steps": {"bf16 eager": gpu.isolated(fail)}, **others})
    assert not gpu.is_ok({"steps": {}, **others, "resume": {"bitwise_equal": False}})
