"""The bit explorer as one page that needs no network: codes, titles, program and style are all in it.

python scripts/explorer.py           all films, from your own cache, to executed/explorer.html
python scripts/explorer.py --public  docs/explorer.html, the page that is passed on: MovieLens may not be, so it holds
                                     codes and at most a hundred titles, of films that the notebooks show anyway
"""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
import binllm_utils as bu
import binllm_widgets as bw

RECIPE = "distinct"  # as in notebook 02: neighbours can be told apart
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline';
  base-uri 'none'; form-action 'none'">
<title>BinLLM: the bit explorer</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0 auto; padding: 12px; max-width: 1124px; font: 15px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 20px; margin: 0 0 6px; }}
{style}
</style>
<main>
<h1>Bits that say who likes what</h1>
<p>Each user and each film has a code of {bits} bits, learned from ratings (recipe {recipe}). The more bits agree, the
surer is the like. {note}</p>
<div id="explorer"></div>
</main>
<script type="module">
{program}
page(document.getElementById("explorer"), {data});
</script>
</html>
"""


def shown_in_notebooks(dataset, most=100):
    """Ids of at most that many films whose titles stand in the notebooks, the most rated ones."""
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "notebooks").glob("*.ipynb")))
    shown = [item for item, title in enumerate(dataset.titles) if json.dumps(title, ensure_ascii=False)[1:-1] in text]
    counts = np.bincount(dataset.train.item, minlength=dataset.n_items)
    return sorted(sorted(shown, key=lambda item: -counts[item])[:most])


def page(dataset, codes, films=None):
    """The page as text."""
    data = json.dumps(bw.explorer_data(dataset, codes, films), ensure_ascii=True)
    for letter in "<>&":  # so that no title can end the script
        data = data.replace(letter, f"\\u{ord(letter):04x}")
    program = (bw.FOLDER / "explorer.js").read_text(encoding="utf-8").replace("export default { render };", "")
    note = (
        "" if films is None else f"Of {dataset.n_items:,} films this page holds {len(films)}; make explorer builds all."
    )
    style = (bw.FOLDER / "explorer.css").read_text(encoding="utf-8")
    return PAGE.format(
        style=style, program=program.replace("export ", ""), data=data, bits=codes.bits, note=note, recipe=RECIPE
    )


def main(public):
    dataset = bu.load_ml1m()
    films = shown_in_notebooks(dataset) if public else None
    path = ROOT / "docs" / "explorer.html" if public else bu.OUTPUT / "explorer.html"
    with bu.replacing(path) as part:
        part.write_text(page(dataset, bu.cached_codes(dataset, recipe=RECIPE), films), encoding="utf-8")
    print(f"{path}: open it in a browser")


if __name__ == "__main__":
    main("--public" in sys.argv[1:])
