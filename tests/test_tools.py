"""The scripts behind tables of the documents: what they measure is what they say."""

import json

import numpy as np
import pytest
import tiny
from clips import make_video

from common.audio import SAMPLE_RATE
from tools import few_steps, joints


def test_a_cut_off_ring_is_a_fall_and_a_hit_a_rise():
    time = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    ring = 0.1 * np.sin(2 * np.pi * 440 * time)
    cut = np.where(time < 1.0, ring, 0)
    rise, fall = joints.steps(cut, 1.0)
    # from -23 to -60 dB, but for the frame in the middle
    assert abs(rise) < 0.5 and 30 < fall < 38
    rise, fall = joints.steps(np.where(time < 1.0, 0, ring), 1.0)
    assert abs(fall) < 0.5 and 30 < rise < 38
    # over 200 ms instead, there is no step
    slow = ring * np.clip((1.0 - time) / 0.2, 0, 1)
    assert joints.steps(slow, 0.9)[1] < 8


@pytest.mark.parametrize("guidance", ["double", "distilled"])
def test_more_steps_come_nearer_to_the_exact_end(guidance, monkeypatch, tmp_path):
    scales = (10.0, 100.0, 10.0) if guidance == "distilled" else ()
    models = tiny.models(columns=4, materials=("wood", "metal"), scales=scales)
    monkeypatch.setattr(few_steps, "load_models", lambda *_: models)
    monkeypatch.setattr(few_steps, "STEPS", (2, 8))
    monkeypatch.setattr(few_steps, "SOLVERS", ("dpm", "unipc"))
    monkeypatch.setattr(few_steps, "SCHEDULES", ("uniform", "karras"))
    monkeypatch.setattr(few_steps, "LEARNED", 1)
    for name in "abc":
        make_video(tmp_path / f"{name}.mp4", 2, flashes=(0.4, 1.2))
    out = tmp_path / "few.jsonl"
    flags = ["--count", "3", "--batch", "2", "--exact", "40", "--search", "2"]
    few_steps.main([str(tmp_path), "--guidance", guidance, *flags, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    distance = {(r["sampler"], r["schedule"], r["steps"]): r["distance"] for r in rows}
    assert len(distance) == len(rows) == 2 * (2 * 2 + 2) + 2
    for sampler in few_steps.SOLVERS:
        assert distance[sampler, "uniform", 8] < distance[sampler, "uniform", 2]
    assert all(r["interval"][0] <= r["distance"] <= r["interval"][1] for r in rows)
    # what is searched lies between the ends
    times = next(r["times"] for r in rows if r["schedule"] == "searched")
    assert len(times) == 3 and times[0] == 999 and times[-1] == 0
