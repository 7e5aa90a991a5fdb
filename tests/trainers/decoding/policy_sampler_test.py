"""The samples of a group share what was read of their prompt."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from espalier.trainers.decoding import policy_sampler
from espalier.trainers.decoding.buckets import padded
from espalier.trainers.decoding.policy_sampler import PolicySampler
from espalier.trainers.decoding.sampling import Sampling
from espalier.trainers.decoding.settings import Beams, Settings
from tests.trainers.decoding.decode_test import PROMPTS, init, make

SAMPLES = 4


def test_a_prompt_is_read_once_for_all_samples_of_its_group(monkeypatch):
    """The samples are those of as many rows that read the prompt each."""
    read = []
    prefill = policy_sampler.prefill

    def recorded(model, params, policy, tokens, lengths, **options):
        read.append(tokens.shape[0])
        return prefill(model, params, policy, tokens, lengths, **options)

    monkeypatch.setattr(policy_sampler, "prefill", recorded)
    model = make()
    params = init(model)
    prompts = PROMPTS[1:3]
    sampling = Sampling(temperature=1.0)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def samples(rows, count):
        settings = Settings(max_new_tokens=5, sampling=sampling, num_samples=count, eos_ids=(3,))
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        sampler = PolicySampler(model, settings, sharding=sharding, seed=3)
        with jax.set_mesh(mesh):
            return sampler(params, *padded(rows, len(rows), 8), number=2)

    shared = samples(prompts, SAMPLES)
    each = samples([prompt for prompt in prompts for _ in range(SAMPLES)], 1)
    assert read == [len(prompts), len(prompts) * SAMPLES]
    assert shared == each and len({tuple(row) for row in shared}) > len(prompts)
    assert all(np.size(row) for row in shared)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(sampling=Sampling(repetition_penalty=1.3)),
        Settings(beams=Beams(num_beams=2), max_new_tokens=2),
    ],
)
def test_what_a_sampler_does_not_obey_is_refused(settings):
    model = make()
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    sampler = PolicySampler(model, settings, sharding=sharding, seed=3)
    with pytest.raises(ValueError, match="remove Settings.beams and Sampling.repetition_penalty"):
        sampler(init(model), *padded(PROMPTS[1:2], 1, 8), number=0)
