"""The files of configs/accelerate as `accelerate launch` reads them, without launching anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _filter_args, _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed import run as torchrun

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "accelerate"
NAMES = ("ddp", "fsdp2", "multinode", "zero2", "zero3")


def launched(name: str, *options: str):
    """The arguments that a launch with this file would have."""
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), *options, "-m", "pivotune", "train", "run.yaml"]
    args = launch_command_parser().parse_args(command)
    args, _, _ = _validate_launch_command(args)
    return args


def test_every_file_is_known():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_takes_the_file(name):
    """Unknown keys and values make it fail."""
    settings = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    args = launched(name)
    # training.bf16 decides.
    assert settings.mixed_precision == args.mixed_precision == "no"
    assert (args.module, args.training_script, args.training_script_args) == (True, "pivotune", ["train", "run.yaml"])
    assert args.num_processes == settings.num_processes == (16 if name == "multinode" else 8)


@pytest.mark.parametrize("name", ["fsdp2", "multinode"])
def test_fsdp_is_version_2_with_whole_checkpoints(name):
    args = launched(name)
    assert args.use_fsdp
    assert not args.use_deepspeed
    assert int(args.fsdp_version) == 2
    assert args.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
    assert args.fsdp_state_dict_type == "FULL_STATE_DICT"
    assert str(args.fsdp_reshard_after_forward).lower() == "true"
    assert str(args.fsdp_cpu_ram_efficient_loading).lower() == "false"
    assert str(args.fsdp_activation_checkpointing).lower() == "false"


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_stages(stage):
    args = launched(f"zero{stage}")
    assert args.use_deepspeed
    assert not args.use_fsdp
    assert int(args.zero_stage) == stage
    if stage == 3:
        assert str(args.zero3_save_16bit_model).lower() == "true"


def torch_settings(args, *options: str):
    """What Accelerate asks torch's launcher for."""
    prepare_multi_gpu_env(args)
    words = ["--training_script", args.training_script, "--training_script_args", args.training_script_args]
    settings, _, _ = torchrun.config_from_args(_filter_args(args, torchrun.get_args_parser(), words))
    return settings


def test_machines_meet_through_c10d_at_the_one_that_is_named():
    args = launched("multinode", "--rdzv_backend", "c10d", "--machine_rank", "1", "--main_process_ip", "node0")
    assert args.machine_rank == 1
    settings = torch_settings(args)
    assert (settings.min_nodes, settings.max_nodes, settings.nproc_per_node) == (2, 2, 8)
    assert (settings.rdzv_backend, settings.rdzv_endpoint) == ("c10d", "node0:29500")


def test_launchers_hand_on_the_signals_that_the_recipes_name(monkeypatch):
    """Not by TORCHELASTIC_SIGNALS_TO_HANDLE, which torch's launcher sets itself."""
    monkeypatch.setenv("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGUSR1")
    monkeypatch.setenv("PET_SHUTDOWN_TIMEOUT", "110")
    own, _, _ = torchrun.config_from_args(torchrun.parse_args(["-m", "pivotune", "train", "run.yaml"]))
    for settings in (own, torch_settings(launched("fsdp2"))):
        assert (settings.signals_to_handle, settings.shutdown_timeout) == ("SIGTERM,SIGUSR1", 110)


def test_one_process_for_each_gpu():
    assert launched("ddp").multi_gpu
