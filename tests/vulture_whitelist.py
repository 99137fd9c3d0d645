"""Names that vulture finds unused in the package, but that callers or libraries use.

pyproject.toml leaves out functions under a decorator that registers them. To refresh: delete names
here, run `vulture`, and put back what something outside the package uses. What nothing uses, delete
from the package.
"""

# Public names, for callers, benchmarks and examples.
_.set_strength  # LoRAHandle
_.export_run  # training.trainer
_.read_metrics  # training.metrics
_.training_grid  # training.fafm: the reference's grid
_.lora_state_dict  # model.linear
_.to_frames  # sampling.conditioning: the way back
_.encode_moments  # WanVAE, with gradients
_.decode_whole
_.draw_scene  # data.sprites
_.render
_.block_errors  # model.fp8
_.vae_to_diffusers  # weights.keymap
_.assert_within_budget  # testing
_.relative_error
_.make_input

_.last_run  # Pipeline
# Read through dataclasses.fields, or by unpacking.
_.quick  # commands.bench
_.provider
_.random_weights
_.y_BLD  # model.dit.Pending
_.gate_BFD
# Launchers that an Op finds by name.
_.gelu_  # native.rows
_.gelu_forward
_.gelu_backward

# Names that a library gives meaning to.
_.standalone_mode  # click.Group.main
_.__signature__  # Typer reads it
_.types  # TorchDispatchMode.__torch_dispatch__
_.model_config  # pydantic.BaseModel
_.formatwarning  # warnings
_.thread_type  # PyAV: streams and codec contexts
_.thread_count
_.pix_fmt
_.color_primaries
_.color_trc
_.color_range
