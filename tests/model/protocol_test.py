"""Every model answers what trainers and commands ask (model/protocol.py)."""

from espalier.model import rows
from espalier.model.config import TransformerConfig
from espalier.model.heads.actor_critic import ActorCritic
from espalier.model.heads.reward_model import RewardModel
from espalier.model.protocol import LanguageModel, Model
from espalier.model.transformer import Transformer
from espalier.model.vision.resnet import ResNet, ResNetConfig, Stem3x3
from espalier.trainers.inputs import Images, PackedTokens

CONFIG = TransformerConfig(vocab_size=16, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=8)


def test_models_of_tokens():
    lm = Transformer(config=CONFIG)
    for model in (lm, RewardModel(backbone=lm), ActorCritic(backbone=lm)):
        assert isinstance(model, LanguageModel) and model.row is rows.TOKENS
        assert len(model.layer_settings()) == 2 and model.cache_sizes(1)["num_heads"] == 2
        assert model.forward_flops(PackedTokens(4).arrays(1)) > 0


def test_models_of_images():
    config = ResNetConfig(num_classes=3, stages=(1,), widths=(8,), stem_width=4)
    model = ResNet(config=config, stem=Stem3x3)
    assert isinstance(model, Model) and not isinstance(model, LanguageModel)
    assert (model.row, model.output, model.layer_settings()) == (rows.IMAGES, "classes", ())
    small, large = (model.forward_flops(Images(size).arrays(1)) for size in (4, 8))
    head = 2 * 8 * 3
    assert (large - head) == 4 * (small - head) > 0


def test_an_object_that_does_not_answer_is_no_model():
    assert not isinstance(CONFIG, Model)
