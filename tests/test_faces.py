"""Real photographs: the authors' own weights, and the command line on people not seen in
training."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import IMPLS

import fastmeta as fm
from fastmeta.meta.evaluate import Start, reached
from fastmeta.tasks.images import image_batch, open_images


@pytest.mark.parametrize("impl", IMPLS)
def test_the_authors_weights_fit_faces_they_have_not_seen(impl, data_path):
    """CelebA weights of 150 000 iterations on six aligned faces of another set, full-image SGD at
    1e-2."""
    pickle = data_path("learnit_celeba_maml/maml_ilr_0.01_olr_1e-05_bs_3_150000.pkl")
    faces = open_images(data_path("faces_london/faces_178.npz"), size=None)
    net, init = fm.load_learnit(pickle)
    assert net == fm.siren(2, 3, width=256, depth=5, w0=200.0, output_shift=0.5)
    batch = image_batch(torch.stack([faces[i] for i in range(6)]), net)
    scores = reached(net, Start(init, 1e-2), batch, range(5), impl=impl)[0].mean(0)
    assert (scores[1:] >= torch.tensor([26.0, 31.0, 33.0, 34.0])).all(), scores


@pytest.mark.slow
def test_the_command_line_on_photographs(data_path, tmp_path):
    """People not seen: at least 6 dB ahead, after 2 steps, of a standard start with its best rule
    and rate."""
    from PIL import Image

    photos = np.load(data_path("faces_mps/faces_64.npz"))
    (tmp_path / "photos").mkdir()
    for image, name in zip(photos["images"], photos["names"], strict=True):
        Image.fromarray(image).save(tmp_path / "photos" / f"{str(name).split('.')[0]}.png")

    def fastmeta(*arguments):
        command = [sys.executable, "-m", "fastmeta", *arguments]
        subprocess.run(command, check=True, cwd=tmp_path, timeout=1500)

    fastmeta("train", "images", "--data", "photos", "--out", "run", "--iterations", "600")
    fastmeta("eval", "run", "--starts", "standard", "--count", "50")
    import csv

    with open(tmp_path / "run" / "eval" / "table.csv") as file:
        rows = {row["start"]: row for row in csv.DictReader(file)}
    ahead = float(rows["maml"]["psnr_2"]) - float(rows["standard"]["psnr_2"])
    assert ahead >= 6.0, rows
