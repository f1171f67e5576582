import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from avcil_dist.config.encoders import AudioMAEConfig, ModelConfig, PrecomputedConfig, SmallConfig, VideoMAEConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.errors import ConfigError
from avcil_dist.models.encoders.audiomae import AudioMAE
from avcil_dist.models.encoders.build import build_audio_encoder, build_visual_encoder
from avcil_dist.models.encoders.small import SmallAudio, SmallVisual
from avcil_dist.models.encoders.videomae import VideoMAE
from avcil_dist.models.network import build_network

CLIP = ClipConfig(frames=4, size=32, mel_frames=64, mel_bins=32)
TINY = {"dim": 24, "depth": 2, "heads": 2}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def videomae(weights: str | Path = "random", clip: ClipConfig = CLIP, **options: object) -> VideoMAE:
    config = VideoMAEConfig.model_validate({"kind": "videomae", "weights": str(weights), **TINY, **options})
    encoder = build_visual_encoder(config, clip, None)
    assert isinstance(encoder, VideoMAE)
    return encoder


def audiomae(weights: str | Path = "random", clip: ClipConfig = CLIP, **options: object) -> AudioMAE:
    config = AudioMAEConfig.model_validate({"kind": "audiomae", "weights": str(weights), **TINY, **options})
    encoder = build_audio_encoder(config, clip, None)
    assert isinstance(encoder, AudioMAE)
    return encoder


def pictures(clips: int) -> Tensor:
    return torch.rand(clips, CLIP.frames, 3, CLIP.size, CLIP.size)


def log_mel(clips: int) -> Tensor:
    return torch.randn(clips, CLIP.mel_frames, CLIP.mel_bins)


def weights_of(encoder: VideoMAE | AudioMAE) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in encoder.body.state_dict().items()}


def test_precomputed_features_pass_in_float32() -> None:
    visual = build_visual_encoder(PrecomputedConfig(kind="precomputed"), CLIP, 6)
    audio = build_audio_encoder(PrecomputedConfig(kind="precomputed"), CLIP, 6)
    tokens, sound = torch.randn(2, 3, 4, 6).half(), torch.randn(2, 6).half()
    assert visual.dim == audio.dim == 6
    assert torch.equal(visual(tokens), tokens.float())
    assert torch.equal(audio(sound), sound.float())


@pytest.mark.parametrize("size", [32, 48, 64])
def test_small_encoders_give_tokens_and_a_vector(size: int) -> None:
    config = SmallConfig(kind="small", dim=10)
    visual, audio = build_visual_encoder(config, CLIP, None), build_audio_encoder(config, CLIP, None)
    assert visual.dim == audio.dim == 10
    assert visual(torch.rand(2, 5, 3, size, size)).shape == (2, 5, 16, 10)
    assert audio(torch.randn(2, 128, size)).shape == (2, 10)


@pytest.mark.parametrize("training", [True, False])
def test_small_encoders_see_each_clip_alone(training: bool) -> None:
    visual, audio = SmallVisual(16).train(training), SmallAudio(16).train(training)
    shown, heard = pictures(6), log_mel(6)
    torch.testing.assert_close(visual(shown)[2:3], visual(shown[2:3]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(audio(heard)[2:3], audio(heard[2:3]), rtol=1e-5, atol=1e-5)


def test_small_visual_encoder_sees_motion() -> None:
    # The same pictures in another order: a frame's tokens change, so they are more than the frame's picture.
    visual, shown = SmallVisual(16), pictures(1)
    backwards = visual(shown.flip(1)).flip(1)
    assert (visual(shown) - backwards).abs().max() > 1e-2


@pytest.mark.parametrize("modality", ["sound", "pictures"])
def test_a_small_encoder_learns_pitch_or_motion_in_a_few_steps(modality: str) -> None:
    # Two classes that only the place on the mel scale tells apart, or only the order of the same four pictures.
    labels = torch.arange(32) % 2
    encoder = SmallAudio(32) if modality == "sound" else SmallVisual(32)
    clips = 0.2 * (log_mel(32) if modality == "sound" else pictures(32))
    for clip, label in enumerate(labels):
        if modality == "sound":
            clips[clip, :, 16 if label else 8] += 1
        else:
            for frame in range(4):
                column = 6 * (frame if label else 3 - frame)
                clips[clip, frame, :, 12:20, column : column + 8] += 1
    head = nn.Linear(32, 2)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=1e-3)
    for _ in range(40):
        features = encoder(clips[:24])
        logits = head(features if modality == "sound" else features.mean(dim=(1, 2)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels[:24]).backward()
        optimizer.step()
    unseen = encoder(clips[24:])
    predicted = head(unseen if modality == "sound" else unseen.mean(dim=(1, 2))).argmax(1)
    assert torch.equal(predicted, labels[24:])


def test_videomae_gives_the_last_hidden_state_by_tubelet() -> None:
    encoder, shown = videomae(), pictures(2)
    tokens = encoder(shown)
    assert encoder.dim == 24
    assert tokens.shape == (2, 2, 4, 24)
    assert torch.equal(tokens.flatten(1, 2), encoder.body(shown).last_hidden_state)


def test_audiomae_is_the_mean_over_patches_without_the_class_token() -> None:
    encoder, heard = audiomae(), log_mel(2)
    sound = encoder(heard)
    assert encoder.dim == 24
    assert sound.shape == (2, 24)
    tokens = encoder.body.forward_features(heard.unsqueeze(1))
    assert tokens.shape == (2, 1 + 8, 24)
    torch.testing.assert_close(sound, tokens[:, 1:].mean(1))


@pytest.mark.parametrize(("make", "inputs"), [(videomae, pictures), (audiomae, log_mel)])
def test_a_frozen_encoder_does_not_change_and_one_that_trains_does(make, inputs) -> None:
    for frozen in (True, False):
        encoder = make(train="frozen" if frozen else "full").train()
        head, before = nn.Linear(24, 2), weights_of(encoder)
        assert encoder.body.training is not frozen
        optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=0.1, weight_decay=0.1)
        output = encoder(inputs(2).requires_grad_())
        assert output.requires_grad is not frozen
        head(output).square().sum().backward()
        optimizer.step()
        same = [torch.equal(tensor, before[name]) for name, tensor in weights_of(encoder).items()]
        assert all(same) if frozen else not any(same)


@pytest.mark.parametrize(("make", "inputs"), [(videomae, pictures), (audiomae, log_mel)])
def test_a_partial_encoder_trains_its_last_blocks_and_final_norm_alone(make, inputs) -> None:
    encoder = make(train="partial", last_blocks=1, depth=3).train()
    before = weights_of(encoder)
    trained = {name for name, parameter in encoder.body.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in before if re.match(r"(encoder\.layer|blocks)\.2\.|layernorm|norm", name)}
    assert [block.training for block in encoder.blocks] == [False, False, True]
    assert not encoder.body.training
    assert not any(module.training for module in encoder.eval().modules())
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.1, weight_decay=0.1)
    encoder(inputs(2)).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in weights_of(encoder).items() if not torch.equal(tensor, before[name])}
    assert changed == trained


@pytest.mark.parametrize(("make", "inputs"), [(videomae, pictures), (audiomae, log_mel)])
def test_a_frozen_encoder_passes_its_own_outputs_through(make, inputs) -> None:
    frozen, batch = make(), inputs(2)
    encoded = frozen.encode_if_frozen(batch)
    assert torch.equal(encoded, frozen(batch))
    assert frozen(encoded) is encoded
    for options in ({"train": "full"}, {"train": "partial", "last_blocks": 1}):
        assert make(**options).encode_if_frozen(batch) is batch


@pytest.mark.parametrize(("make", "inputs"), [(videomae, pictures), (audiomae, log_mel)])
def test_nothing_is_saved_for_backward_below_the_trained_blocks(make, inputs) -> None:
    # Memory of autograd grows with the trained blocks, not with those below; a frozen encoder saves nothing.
    def saved_bytes(**options: object) -> int:
        sizes: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            tensors.append(tensor)
            return tensor

        tensors: list[Tensor] = []
        encoder, batch = make(**options), inputs(8)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            encoder(batch)
        own = {tensor.untyped_storage().data_ptr() for tensor in encoder.state_dict().values()}
        return sum(size for address, size in sizes.items() if address not in own)

    assert saved_bytes(depth=4) == 0
    one = saved_bytes(train="partial", last_blocks=1, depth=1)
    assert saved_bytes(train="partial", last_blocks=1, depth=4) == one
    assert saved_bytes(train="partial", last_blocks=2, depth=4) > 1.8 * one
    assert saved_bytes(train="full", depth=4) > 3.6 * one


@pytest.mark.parametrize(("make", "inputs"), [(videomae, pictures), (audiomae, log_mel)])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.bin"])
def test_weights_from_a_file_give_the_same_output(tmp_path: Path, make, inputs, name: str) -> None:
    original, batch = make(), inputs(2)
    path = tmp_path / name
    state = weights_of(original) | {"mask_token": torch.zeros(1)}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"model": state}, path)
    assert torch.equal(make(path)(batch), original(batch))


def test_videomae_from_a_folder_of_a_pretraining_checkpoint(tmp_path: Path) -> None:
    config = transformers.VideoMAEConfig(
        image_size=32, num_frames=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, use_mean_pooling=False,
    )  # fmt: skip
    model = transformers.VideoMAEForPreTraining(config).eval()
    model.save_pretrained(tmp_path)
    shown = pictures(2)
    expected = model.videomae(shown).last_hidden_state
    torch.testing.assert_close(videomae(tmp_path)(shown).flatten(1, 2), expected)
    with pytest.raises(ConfigError, match="has 2 attention heads, the config 4; set heads: 2"):
        videomae(tmp_path, heads=4)


def test_older_names_of_videomae_biases_are_understood(tmp_path: Path) -> None:
    original, shown = videomae(), pictures(1)
    state = weights_of(original)
    for name in [name for name in state if name.endswith(("query.bias", "value.bias"))]:
        state[name] = torch.randn(24)
    original.body.load_state_dict(state)
    older = {
        "videomae." + name.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): tensor
        for name, tensor in state.items()
    }
    save_file(older, tmp_path / "old.safetensors")
    assert torch.equal(videomae(tmp_path / "old.safetensors")(shown), original(shown))


@pytest.mark.parametrize("finetuned", [False, True])
def test_the_names_of_videomaes_authors_are_understood(tmp_path: Path, finetuned: bool) -> None:
    original, shown = videomae(), pictures(1)
    for parameter in original.body.parameters():
        nn.init.normal_(parameter, std=0.1)
    prefix = "" if finetuned else "encoder."
    names = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj", "encoder.layer": "blocks",
        "attention.output.dense": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
        "attention.attention.query.bias": "attn.q_bias", "attention.attention.value.bias": "attn.v_bias",
    }  # fmt: skip
    state, theirs = weights_of(original), dict[str, Tensor]()
    for number in range(TINY["depth"]):
        names_of_parts = [
            f"encoder.layer.{number}.attention.attention.{part}.weight" for part in ("query", "key", "value")
        ]
        theirs[f"{prefix}blocks.{number}.attn.qkv.weight"] = torch.cat([state.pop(name) for name in names_of_parts])
    for name, tensor in state.items():
        for own, other in names.items():
            name = name.replace(own, other)
        theirs[prefix + name.replace("layernorm", "norm")] = tensor
    if finetuned:
        theirs |= {"head.weight": torch.zeros(3, 24), "fc_norm.weight": torch.zeros(24)}
        del theirs["norm.weight"], theirs["norm.bias"]
        original.body.layernorm = None
    else:
        theirs |= {"encoder_to_decoder.weight": torch.zeros(3), "decoder.blocks.0.norm1.weight": torch.zeros(3)}
    torch.save({"module" if finetuned else "model": theirs}, tmp_path / "theirs.pth")
    torch.testing.assert_close(videomae(tmp_path / "theirs.pth")(shown), original(shown))


def test_a_finetuned_audiomae_normalises_after_the_mean(tmp_path: Path) -> None:
    state = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: tensor
             for name, tensor in weights_of(audiomae()).items()}  # fmt: skip
    save_file(state, tmp_path / "finetuned.safetensors")
    encoder, heard = audiomae(tmp_path / "finetuned.safetensors"), log_mel(2)
    tokens = encoder.body.forward_features(heard.unsqueeze(1))
    torch.testing.assert_close(encoder(heard), encoder.body.fc_norm(tokens[:, 1:].mean(1)))


@pytest.mark.parametrize("make", [videomae, audiomae])
def test_weights_that_do_not_fit_are_named(tmp_path: Path, make) -> None:
    state = weights_of(make())
    removed, reshaped = list(state)[:2]
    del state[removed]
    state[reshaped] = torch.zeros(3)
    state["stray.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(ConfigError) as error:
        make(tmp_path / "bad.safetensors")
    for part in (f"1 missing ({removed})", "1 unexpected (stray.weight)", f"1 of another shape ({reshaped})"):
        assert part in str(error.value)


def test_a_checkpoint_of_other_objects_is_not_unpickled(tmp_path: Path) -> None:
    torch.save({"model": weights_of(audiomae()), "args": Path("x")}, tmp_path / "objects.pth")
    with pytest.raises(ConfigError, match=r"objects\.pth does not read as a file of tensors"):
        audiomae(tmp_path / "objects.pth")


def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="is not a state dict"):
        videomae(tmp_path / "other.pth")


def test_a_path_without_a_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        videomae(tmp_path / "absent.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        videomae(tmp_path)


def test_the_error_of_an_unreachable_hub_suggests_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="nobody/nothing-of-this-name is neither a path nor reachable on the hub"):
        videomae("nobody/nothing-of-this-name")


@pytest.mark.parametrize(
    ("make", "clip", "options", "setting"),
    [
        (videomae, {"size": 40}, {}, "data.clip.size=40"),
        (videomae, {"frames": 5}, {}, "data.clip.frames=5"),
        (videomae, {}, {"heads": 5}, "model.visual.dim=24"),
        (audiomae, {"mel_frames": 100}, {}, "data.clip.mel_frames=100"),
        (audiomae, {"mel_bins": 40}, {}, "data.clip.mel_bins=40"),
        (audiomae, {}, {"heads": 5}, "model.audio.dim=24"),
    ],
)
def test_sizes_that_patches_do_not_fill_are_refused(make, clip: dict, options: dict, setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting} is not a multiple of"):
        make(clip=CLIP.model_copy(update=clip), **options)


def model_config(visual: dict, audio: dict) -> ModelConfig:
    return ModelConfig.model_validate({"visual": visual, "audio": audio})


def test_a_network_is_built_for_clips_and_for_features() -> None:
    small = {"kind": "small", "dim": 16}
    network = build_network(model_config(small, small), CLIP, {}, num_classes=3)
    assert network(pictures(2), log_mel(2)).logits.shape == (2, 3)
    features = {"kind": "precomputed"}
    shape = {"frames": 2, "positions": 5, "dim": 6}
    network = build_network(model_config(features, features), CLIP, shape, num_classes=3)
    assert network(torch.randn(2, 2, 5, 6), torch.randn(2, 6)).visual.shape == (2, 6)


def test_encoders_must_agree_with_each_other_and_with_the_data() -> None:
    small, wide, features = {"kind": "small", "dim": 16}, {"kind": "small", "dim": 32}, {"kind": "precomputed"}
    with pytest.raises(ConfigError, match=r"visual encoder has dim 16, the audio encoder 32"):
        build_network(model_config(small, wide), CLIP, {}, num_classes=3)
    with pytest.raises(ConfigError, match="precomputed needs feature shards"):
        build_network(model_config(features, features), CLIP, {}, num_classes=3)
    with pytest.raises(ConfigError, match="small needs clips"):
        build_network(model_config(small, small), CLIP, {"frames": 2, "positions": 5, "dim": 6}, num_classes=3)


def test_a_network_whose_state_is_loaded_later_reads_no_weights(tmp_path: Path) -> None:
    # Fine-tuned checkpoints: one has no norm over its tokens, the other has it after the mean.
    shown = {name: tensor for name, tensor in weights_of(videomae()).items() if not name.startswith("layernorm.")}
    heard = {re.sub(r"^norm\.", "fc_norm.", name): tensor for name, tensor in weights_of(audiomae()).items()}
    sections = []
    for kind, state in (("videomae", shown), ("audiomae", heard)):
        save_file(state, tmp_path / f"{kind}.safetensors")
        sections.append({"kind": kind, "weights": str(tmp_path / f"{kind}.safetensors"), **TINY})
    config = model_config(*sections)
    first = build_network(config, CLIP, {}, num_classes=3)
    state = first.state_dict()
    for path in tmp_path.iterdir():
        path.unlink()
    second = build_network(config, CLIP, {}, num_classes=3, state_keys=state.keys())
    second.load_state_dict(state)
    batch = pictures(2), log_mel(2)
    assert torch.equal(second(*batch).logits, first(*batch).logits)
    with pytest.raises(ConfigError, match="no such file"):
        build_network(config, CLIP, {}, num_classes=3)


@pytest.mark.slow
def test_libraries_of_transformers_are_imported_only_for_a_configuration_that_names_them() -> None:
    code = "import sys, avcil_dist.models.network; print(*{'transformers', 'timm', 'huggingface_hub'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
