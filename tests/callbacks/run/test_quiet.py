"""Known noise of libraries is kept out of the log, by name; everything else stays."""

import logging
import warnings

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from callbacks.run import quiet as module
from callbacks.run.quiet import is_noise, quiet

NOISE = [
    "Seed set to 0",
    "GPU available: True (cuda), used: False",
    "💡 Tip: For seamless cloud logging and experiment tracking, try installing [litlogger]",
    "The number of training batches (31) is smaller than the logging interval Trainer(log_every_n_steps=50).",
    "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
]
SAID = [
    "ckpt_path auto: going on from 'last.ckpt'.",
    "loss is not finite",
    "Total training batches: Seed set to",
]


def test_only_known_sentences_are_noise():
    assert all(map(is_noise, NOISE))
    assert not any(map(is_noise, SAID))


def test_the_log_is_without_noise_inside_and_with_it_outside(caplog):
    handler = caplog.handler
    logging.getLogger("lightning.pytorch").addHandler(handler)
    try:
        with quiet():
            for sentence in NOISE + SAID:
                rank_zero_info(sentence)
        assert caplog.messages == SAID
        rank_zero_info(NOISE[0])
        assert caplog.messages[-1] == NOISE[0]
    finally:
        logging.getLogger("lightning.pytorch").removeHandler(handler)


def test_warnings_that_are_known_are_left_out_and_ours_name_no_file():
    before = warnings.formatwarning
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # whatever filters the session has
        with quiet():
            for sentence in [*NOISE, SAID[1]]:
                rank_zero_warn(sentence)
            ours = warnings.formatwarning("a run", UserWarning, module.__file__, 3)
            theirs = warnings.formatwarning("a run", UserWarning, "/lib/torch/x.py", 3)
    assert [str(warning.message) for warning in caught] == [SAID[1]]
    assert (ours, theirs) == ("warning: a run\n", "/lib/torch/x.py:3: a run\n")
    assert warnings.formatwarning is before
