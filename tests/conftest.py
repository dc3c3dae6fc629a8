"""The same state before every test and fixture, whatever ran before; which tests are fast; and tiny
models for all."""

import os
import random

import background
import numpy as np
import pytest

# Of several processes on few cores, those that wait must sleep, not spin: two ranks beside other
# busy processes took 15 minutes instead of one. Torch, which therefore comes later, and the
# processes that tests start read what this sets.
from common import startup

# `python -m pytest -m fast` runs the tests of these files in under a minute, but for those named,
# which take a second or more each. `tests/test_layers.py` checks the names.
FAST = {
    # how the code is put together, documents
    "test_bounds": (),
    "test_structure": (),
    "test_layers": (),
    "test_docs": (
        "test_commands_name_flags_that_exist",
        "test_the_code_of_the_interface_page_runs",
    ),
    # networks and samplers
    "test_plain": (),
    "test_samplers": (),
    "test_stages": (),
    "test_fast": (
        "test_optimised_networks_give_the_same_numbers",
        "test_a_recorded_step_serves_all_clips",
    ),
    "test_parity": (
        "test_sampling_with_the_full_networks",
        "test_bfloat16_stages",
        "test_time_embedding",
        "test_unet",
        "test_cavp_temperature",
        "test_cavp_video",
        "test_cavp_audio",
        "test_autoencoder_encode",
        "test_autoencoder_decode",
        "test_a_clip_prepares_its_condition_once",
        "test_features_do_not_depend_on_chunks",
        "test_classifier",
        "test_ldm_decode_is_the_first_channel_clamped",
        "test_plain_readings_agree",
        "test_null_context_is_the_conditioner_of_zero_features",
    ),
    # sound
    "test_audio": ("test_griffin_lim_in_chunks_is_the_textbook_one",),
    "test_vocoders": ("test_every_way_gives_the_sound_of_the_mel", "test_the_table"),
    "test_foley": (
        "test_clips_are_those_of_the_shipped_set",
        "test_clips_are_those_of_the_shipped_set_bit_for_bit",
        "test_files_do_not_depend_on_the_workers",
        "test_real_rates_are_those_of_films_of_impacts",
        "test_interrupt_leaves_complete_clips_only",
    ),
    "test_judge": ("test_it_learns_and_loads",),
    "test_watermark": (
        "test_it_is_as_long_and_seldom_louder_or_softer_by_more_than_a_decibel",
        "test_nothing_else_changes",
        "test_confidence_is_what_it_says",
        "test_the_mark_survives",
        "test_a_long_sound_is_marked_throughout",
        "test_other_speeds_are_found",
        "test_other_tempos_and_pitches_are_found",
        "test_the_search_is_part_of_the_confidence",
    ),
    # files
    "test_loudness": (),
    "test_mix": ("test_all_flags_at_once",),
    "test_provenance": (
        "test_every_container_says_what_it_is",
        "test_signed_outputs_satisfy_the_librarys_own_reader",
        "test_verify_prints_what_the_xmp_says",
    ),
    "test_motion": ("test_a_file_gives_the_motion_of_its_frames",),
    "test_finder": (
        "test_it_learns_from_sound_alone",
        "test_a_resumed_run_goes_on_bit_for_bit",
        "test_the_shipped_finder_finds_hits",
    ),
    "test_onsets": (),
    "test_controls": (),
    "test_redo": (
        "test_an_output_is_redone_and_the_rest_stays",
        "test_without_an_output_it_is_the_clips_own_sound",
        "test_a_stem_is_not_redone_in_place_of_the_mix",
        "test_the_joints_of_the_shipped_model_are_no_clicks",
    ),
    "test_directing": ("test_the_shipped_model_plays_what_it_is_told",),
    "test_media": ("test_a_full_disk_leaves_nothing",),
    "test_containers": (
        "test_two_signals_end_it_at_once",
        "test_a_dead_decoder_ends_one_input_with_one_line",
    ),
    "test_checkpoints": (
        "test_official_files_load_strictly",
        "test_loading_needs_the_networks_own_memory",
        "test_autoencoder_loads_out_of_an_ldm_file",
        "test_mini_presets_load_what_they_save",
        "test_convert",
    ),
    "test_hub": (),
    "test_pick": ("test_stems_are_those_of_the_pick",),
    "test_page": (
        "test_a_page_of_somebody_else_is_not_overwritten",
        "test_other_sounds_are_another_clip",
        "test_stems_are_heard_but_not_those_of_an_earlier_run",
        "test_the_key_says_which_sound_is_whose_and_nothing_else_does",
    ),
    "test_rights": (
        "test_the_command_keeps_them_and_leaves_out_the_rest",
        "test_a_set_takes_more_rows_and_forgets_none",
        "test_a_kill_parts_no_clip_from_its_rights",
        "test_check_counts_them_and_sees_a_change",
        "test_clips_of_foley_say_theirs_themselves",
        "test_the_header_says_whose_the_clips_were",
        "test_a_run_of_the_release_before_goes_on",
        "test_the_card_of_a_run",
        "test_converted_weights_keep_what_they_say",
    ),
    # the command line: outputs and mistakes
    "test_jobs": (
        "test_what_changes_an_output_draws_it_again",
        "test_a_damaged_manifest_costs_its_lines_alone",
        "test_lines_of_many_processes_stay_whole",
        "test_torchrun_makes_the_same_sounds_with_one_line_a_file",
    ),
    "test_sample": (
        "test_windows_of_many_clips_share_batches",
        "test_the_mini_model_is_used_where_none_is_given",
        "test_guidance_scales_are_the_weights_own_unless_given",
        "test_plot_marks_annotated_and_generated_onsets",
        "test_same_seed_same_sound_at_any_batch",
        "test_hits_stay_in_time_for_five_minutes",
        "test_help_and_dashed_names_from_a_shell",
        "test_ctrl_c_says_one_line_and_leaves_nothing",
        "test_a_command_leaves_its_imports_out_of_the_search_for_garbage",
        "test_sound_is_exactly_as_long_as_the_picture",
        "test_every_sound_that_is_written_is_marked",
        "test_page_has_every_input_or_why_not",
        "test_wide_networks_are_in_bfloat16_where_the_cpu_computes_in_it",
        "test_command_writes_video_and_wav_and_says_so",
        "test_best_candidate_is_the_highest_score_and_scores_see_the_picture",
        "test_keep_audio_mixes_the_clips_own_sound",
        "test_another_input_does_not_change_a_sound",
        "test_two_inputs_of_one_name_are_told_apart",
        "test_long_sound_is_vocoded_in_spans_without_slip_or_hole",
    ),
    "test_long": (
        "test_windows_are_drawn_with_their_neighbors_latents_at_any_batch",
        "test_a_killed_run_goes_on_to_the_same_bytes",
        "test_marking_and_limiting_in_place_are_the_same",
    ),
}


def pytest_collection_finish(session):
    # modules and tests are no garbage
    startup.imported(True)
    # a worker of pytest-xdist does not know which tests are its own
    if not (session.config.option.collectonly or "PYTEST_XDIST_WORKER" in os.environ):
        background.start_for(session.items)


def pytest_sessionfinish():
    background.stop()


def pytest_collection_modifyitems(items):
    # those last that wait for other processes
    items.sort(key=lambda item: "processes" in getattr(item, "fixturenames", ()))
    for item in items:
        name = item.originalname or item.name
        too_long = item.get_closest_marker("slow") or item.get_closest_marker("gpu")
        if not too_long and name not in FAST.get(item.path.stem, (name,)):
            item.add_marker("fast")


def seed():
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def models():
    """Tiny random networks, of the real classes."""
    import tiny

    return tiny.models()


@pytest.fixture(scope="session")
def weights(models, tmp_path_factory):
    """The folder of their checkpoints."""
    import tiny

    return tiny.save(models, tmp_path_factory.mktemp("weights") / "tiny")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    import kernels

    kernels.mode = "auto"  # which the main job sets for the process


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup():
    seed()  # a fixture of several tests is made in whichever of them comes first


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    seed()
