"""The page of `infer_view`: a template with two holes, `{{title}}` (escaped HTML) and `{{data}}`
(JSON without "<").

Its policy allows nothing but what is inline: no network, no other file. It works from disk,
offline, in light and dark.
"""

from __future__ import annotations

__all__ = ["PAGE"]

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{{title}}</title>
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); --found: #ff5c00; --truth: #009eff; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0; }
header { position: sticky; top: 0; z-index: 1; background: Canvas; border-bottom: 1px solid var(--line); padding: .6rem 1rem;
         display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; align-items: center; }
h1 { font-size: 1rem; margin: 0 auto 0 0; }
label { display: flex; gap: .5rem; align-items: center; }
input[type=range] { width: 14rem; accent-color: var(--found); }
output { font-variant-numeric: tabular-nums; min-width: 2.6em; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem; padding: 1rem; }
figure { margin: 0; }
.frame { position: relative; line-height: 0; }
.frame img, .frame canvas { width: 100%; height: auto; border-radius: 4px; }
.frame canvas { position: absolute; inset: 0; height: 100%; }
figcaption { display: flex; justify-content: space-between; gap: 1rem; font-size: .85rem; padding-top: .3rem; overflow-wrap: anywhere; }
figcaption span + span { white-space: nowrap; opacity: .75; }
.found { color: var(--found); } .truth { color: var(--truth); }
</style>
</head>
<body>
<header>
<h1>{{title}}</h1>
<span id="sum"></span>
<label>score at least <input id="slider" type="range" min="0" max="1" step="0.01"><output id="value"></output></label>
<label><input id="found" type="checkbox" checked><b class="found">found</b></label>
<label id="truths"><input id="truth" type="checkbox" checked><b class="truth">truth</b></label>
<label><input id="text" type="checkbox" checked>names</label>
</header>
<main></main>
<script id="data" type="application/json">{{data}}</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("slider"), main = document.querySelector("main");
const option = name => document.getElementById(name).checked;
slider.value = data.threshold;
document.getElementById("truths").hidden = !data.pictures.some(picture => picture.truth);
const shown = data.pictures.map(picture => {
  const figure = document.createElement("figure"), frame = document.createElement("div"), image = new Image();
  const canvas = document.createElement("canvas"), caption = document.createElement("figcaption");
  const name = document.createElement("span"), count = document.createElement("span");
  frame.className = "frame"; name.textContent = picture.name;
  image.alt = picture.name; image.width = canvas.width = picture.width; image.height = canvas.height = picture.height;
  image.src = "data:image/jpeg;base64," + picture.jpeg;
  frame.append(image, canvas); caption.append(name, count); figure.append(frame, caption); main.append(figure);
  return { picture, canvas, count };
});
function draw() {
  const least = Number(slider.value);
  let total = 0;
  document.getElementById("value").textContent = least.toFixed(2);
  for (const { picture, canvas, count } of shown) {
    const pen = canvas.getContext("2d"), unit = Math.max(1, picture.width / 320);
    const kept = picture.found.filter(box => box[4] >= least);
    total += kept.length;
    pen.clearRect(0, 0, canvas.width, canvas.height);
    pen.font = `${Math.round(9 * unit)}px system-ui, sans-serif`; pen.textBaseline = "top";
    if (option("truth") && picture.truth) {
      pen.strokeStyle = "#009eff"; pen.lineWidth = unit; pen.setLineDash([3 * unit, 2 * unit]);
      for (const [left, top, right, bottom] of picture.truth) pen.strokeRect(left, top, right - left, bottom - top);
      pen.setLineDash([]);
    }
    if (option("found")) for (const [left, top, right, bottom, score, label] of kept.slice().reverse()) {
      pen.strokeStyle = pen.fillStyle = "#ff5c00"; pen.lineWidth = 1.5 * unit;
      pen.strokeRect(left, top, right - left, bottom - top);
      if (!option("text")) continue;
      const words = `${label} ${score.toFixed(2)}`.trim();
      pen.fillRect(left, top, pen.measureText(words).width + 4 * unit, 11 * unit);
      pen.fillStyle = "#000"; pen.fillText(words, left + 2 * unit, top + unit);
    }
    count.textContent = `${kept.length} found` + (picture.truth ? `, ${picture.truth.length} true` : "");
  }
  document.getElementById("sum").textContent = `${shown.length} pictures, ${total} boxes`;
}
for (const id of ["slider", "found", "truth", "text"]) document.getElementById(id).addEventListener("input", draw);
draw();
</script>
</body>
</html>
"""
