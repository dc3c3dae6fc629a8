"""What several test files need of the main job: random networks, and sample.py in this process."""

import torch

import sample


def shuffled(model, seed):
    """Add noise to every weight, the zero-initialized too: each input reaches the output."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=rng)
    return model.eval().requires_grad_(False)


def run(capsys, *argv):
    """sample.py with these arguments -> exit status, lines of stdout, lines of stderr."""
    try:
        status = sample.main([str(a) for a in argv])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out.splitlines(), err.splitlines()
