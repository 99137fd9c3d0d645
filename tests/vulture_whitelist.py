"""Names that vulture finds unused in the package but that are not: callers and frameworks use them. `vulture` reads this file.

Functions under a decorator that registers them are left out in pyproject.toml. To refresh: delete a name, run `vulture`, and put
back what it prints if something outside the package uses it. Delete from the package what nothing uses.
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

# Names that a library gives meaning to.
_.standalone_mode  # click.Group.main
_.types  # TorchDispatchMode.__torch_dispatch__
_.model_config  # pydantic.BaseModel
_.formatwarning  # warnings
_.thread_type  # PyAV: streams and codec contexts
_.thread_count
_.pix_fmt
_.color_primaries
_.color_trc
_.color_range
