"""Models of audio."""

from __future__ import annotations

from thresher.models.families.particular.entry import Particular
from thresher.models.families.tensors import PROMPT, Maker, constant, fixed, normal, ones, whole


def spectrogram(frames: int, bins: int, mask: str = "input_features_mask") -> dict[str, Maker]:
    """Return makers of frames of this many bins, none of which is padding."""
    return {"input_features": normal(1, frames, bins), mask: ones(1, frames)}


NARROW = {"num_filters": 4}

AUDIO: dict[str, Particular] = {
    "audioflamingo3_encoder": Particular(
        "bins come before frames, and it needs its mask",
        inputs={"input_features": normal(1, 128, 256), "input_features_mask": ones(1, 256)},
    ),
    "fun_asr_nano_encoder": Particular("it reads seven frames of 80 bins at once", inputs=spectrogram(24, 560)),
    "gemma3n_audio": Particular(
        "a true value of its mask is padding",
        inputs={"audio_mel": normal(1, 64, 128), "audio_mel_mask": fixed([[False] * 64])},
    ),
    "gemma4_audio": Particular("its bins follow from its convolutions", inputs=spectrogram(64, 128, "attention_mask")),
    "granite_speech5_ctc": Particular(
        "it reads four frames of 80 bins at once", inputs={"input_features": normal(1, 32, 320)}
    ),
    "granite_speech5_encoder": Particular(
        "it reads four frames of 80 bins at once", inputs={"input_features": normal(1, 32, 320)}
    ),
    "nemotron3_5_transcribe_audio": Particular(
        "frames come before bins, in multiples of eight", inputs=spectrogram(64, 128)
    ),
    "qwen3_asr_encoder": Particular(
        "bins come before frames, in multiples of its window",
        inputs={"input_features": normal(1, 128, 200), "input_features_mask": ones(1, 200)},
    ),
    "wav2vec2-bert": Particular(
        "it reads two frames of 80 bins at once", inputs=spectrogram(64, 160, "attention_mask")
    ),
    "mimi_decoder": Particular(
        "it reads what the encoder has written, each channel by itself",
        config={"upsample_groups": 64},
        inputs={"latents": normal(1, 64, 6)},
    ),
    "pocket_tts_audio_tokenizer_decoder": Particular(
        "it reads what the encoder has written, each channel by itself",
        config={"upsample_groups": 64},
        inputs={"latents": normal(1, 64, 6)},
    ),
    "xcodec2": Particular(
        "samples and frames are of the same audio",
        config={"quantization_dim": 128},
        inputs={"input_values": normal(1, 1, 2560), "input_features": normal(1, 8, 160)},
    ),
    "neucodec": Particular(
        "samples and frames are of the same audio",
        config={"quantization_dim": 128},
        inputs={"input_values": normal(1, 1, 2560), "input_features": normal(1, 8, 160)},
    ),
    "kyutai_speech_to_text": Particular(
        "every step has a token of text and one of each codebook", inputs={"input_ids": whole(300, 1, 12, 33)}
    ),
    "muse_spark_audio": Particular(
        "samples in multiples of its patches",
        config={"hidden_sizes": [16, 32, 64, 128]},
        inputs={"input_values": normal(1, 3840)},
    ),
    "speecht5": Particular(
        "the model without its nets before and after reads states; the one that writes speech drops out at random always",
        model="SpeechT5ForSpeechToText",
        inputs={"input_values": normal(1, 4000), "decoder_input_ids": whole(80, 1, 12, low=5)},
    ),
    "vibevoice_acoustic_tokenizer_decoder": Particular(
        "its widths double with every layer; it reads latents",
        config=NARROW,
        inputs={"hidden_states": normal(1, 64, 3)},
    ),
    "vibevoice_acoustic_tokenizer_encoder": Particular(
        "its widths double with every layer; it reads samples",
        config=NARROW,
        inputs={"hidden_states": normal(1, 1, 6400)},
    ),
    "vibevoice_acoustic_tokenizer": Particular(
        "its widths double with every layer; it draws its latents at random unless told otherwise",
        config=NARROW,
        inputs={"input_values": normal(1, 1, 6400), "sample": constant(False)},
    ),
    "vibevoice_asr": Particular(
        "widths of its tokenizers double with every layer",
        config={"acoustic_tokenizer_encoder_config": NARROW, "semantic_tokenizer_encoder_config": NARROW},
    ),
    "vibevoice": Particular(
        "widths of its tokenizers double with every layer",
        config={"audio_config": NARROW, "semantic_model_config": NARROW},
    ),
    "voxtral_realtime": Particular(
        "every token comes with eight frames of audio",
        inputs={"input_ids": whole(300, 1, 8, low=5), "input_features": normal(1, 128, 64)},
    ),
    "voxtral_realtime_text": Particular(
        "its norms read an embedding of the delay",
        inputs={"input_ids": PROMPT, "t_cond": normal(1, 1, 64)},
    ),
    "csm": Particular("its codec reads each channel by itself", config={"codec_config": {"upsample_groups": 64}}),
    "musicgen": Particular(
        "the model without a head is its decoder",
        model="MusicgenForConditionalGeneration",
        inputs={"input_ids": PROMPT, "decoder_input_ids": whole(300, 4, 8)},
    ),
    "musicgen_melody": Particular(
        "the model without a head is its decoder",
        model="MusicgenMelodyForConditionalGeneration",
        inputs={"input_ids": PROMPT, "decoder_input_ids": whole(300, 4, 8)},
    ),
    "clvp": Particular(
        "it reads text and a spectrogram, and the tokens of one part are read by another; its heads are rotated by 32 numbers at least",
        config={
            "text_config": {"num_attention_heads": 2},
            "speech_config": {"vocab_size": 320, "num_attention_heads": 2},
        },
        inputs={"input_ids": whole(250, 1, 12, low=5), "input_features": normal(1, 80, 64)},
    ),
    "moonshine_streaming": Particular(
        "its decoder's heads of keys have no default",
        config={"num_key_value_heads": 4},
        inputs={"input_values": normal(1, 8000), "decoder_input_ids": PROMPT},
    ),
    "speech-encoder-decoder": Particular(
        "its argument has a name of its own",
        inputs={"inputs": normal(1, 4000), "decoder_input_ids": PROMPT},
    ),
    "univnet": Particular(
        "it draws noise at random unless it is given",
        inputs={"input_features": normal(1, 24, 100), "noise_sequence": normal(1, 24, 64)},
    ),
    "vits": Particular(
        "it draws noise at random, unless there is none of it", config={"noise_scale": 0.0, "noise_scale_duration": 0.0}
    ),
}
