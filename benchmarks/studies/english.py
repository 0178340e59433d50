"""The text that studies train on and are asked about."""

from pathlib import Path

from moe.data import Source, TokenData, default_sources, prepare


def text(place: Path) -> TokenData:
    """English plays under a BPE of 512, prepared on the first run; of other prepared data, the first source."""
    if not (place / "index.json").is_file():
        sources: list[Source | str | Path] = [s for s in default_sources()[0] if s.name == "text"]
        if not sources:
            raise SystemExit('no English text: pip install "gpt4-moe[data]", or give prepared data with --data')
        print(f"preparing text in {place}", flush=True)
        prepare(sources, place, vocab_size=512)
    return TokenData.open(place)
