"""A corpus of 200 pages, and ten questions about it, for the suite hotpotqa."""

import json
from pathlib import Path

PLACES = ("Oslo", "Bergen", "Turku", "Malmö", "Gdańsk", "Tartu", "Visby", "Narvik", "Umeå", "Kiel")
TRADES = ("baker", "glazier", "cooper", "weaver", "printer", "miller", "potter", "tanner", "saddler", "smith")


def pages() -> list[dict[str, str]]:
    """Returns 200 pages: a hundred people, and the street in which each lived."""
    rows = []
    for at, (place, trade) in enumerate((place, trade) for place in PLACES for trade in TRADES):
        street = f"{trade.title()} Street ({place})"
        rows.append(
            {
                "title": f"The {trade} of {place}",
                "text": f"The {trade} of {place} was known everywhere. Many visited. Few stayed. It rained. It snowed."
                f" The workshop stood in {street}.",
            }
        )
        rows.append({"title": street, "text": f"{street} is a street. It was laid out in {1500 + at}."})
    assert len(rows) == 200
    return rows


def question(place: str, trade: str) -> str:
    return f"In which year was the street laid out in which the {trade} of {place} had a workshop?"


def write(folder: Path) -> Path:
    """Writes pages.jsonl and questions.jsonl to the folder; returns it."""
    (folder / "pages.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages()), encoding="utf-8")
    rows = [
        {"_id": f"q{at}", "question": question(place, TRADES[at]), "answer": str(1500 + 11 * at), "level": level}
        for at, (place, level) in enumerate(zip(PLACES, ("easy", "medium", "hard", "easy", "medium") * 2, strict=True))
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
