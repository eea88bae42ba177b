"""The page around the picture of a network (`models.draw.html`): its script, and everything else as a template."""

from __future__ import annotations

from string import Template

SCRIPT = """
"use strict";
const rows = JSON.parse(document.getElementById("facts").textContent);
const stage = document.getElementById("stage"), card = document.getElementById("card");
const svg = stage.querySelector("svg");
const full = svg.viewBox.baseVal, width = full.width, height = full.height;
const LEAST = 0.08, MOST = 5;
let view = { x: 0, y: 0, zoom: 1 };  // the stage's corner in units of the drawing, pixels a unit
let pinned = null;  // the row whose card stays

function draw() {
  const shown = [view.x, view.y, stage.clientWidth / view.zoom, stage.clientHeight / view.zoom];
  svg.setAttribute("viewBox", shown.join(" "));
}
function zoomAt(factor, px = stage.clientWidth / 2, py = stage.clientHeight / 2) {
  const zoom = Math.min(MOST, Math.max(LEAST, view.zoom * factor));
  view.x += px / view.zoom - px / zoom;
  view.y += py / view.zoom - py / zoom;
  view.zoom = zoom;
  draw();
}
function pan(px, py) { view.x += px / view.zoom; view.y += py / view.zoom; draw(); }
function fit() {
  const w = stage.clientWidth, h = stage.clientHeight;
  show(Math.min(w / width, h / height, 1.6));
}
function show(zoom) {
  const w = stage.clientWidth, h = stage.clientHeight;
  view = { zoom, x: (width - w / zoom) / 2, y: height * zoom < h ? (height - h / zoom) / 2 : 0 };
  draw();
}
function start() {  // whole, unless that is too small to read
  const w = stage.clientWidth, h = stage.clientHeight;
  const whole = Math.min(w / width, h / height, 1.6);
  show(whole >= 0.62 ? whole : Math.min(Math.max(w / width, 0.62), 1));
}
function bring(index) {  // a row into the middle, where it cannot be seen
  const box = rowOf(index).querySelector(".box").getBBox();
  const w = stage.clientWidth / view.zoom, h = stage.clientHeight / view.zoom;
  const x = box.x + box.width / 2, y = box.y + box.height / 2;
  if (x < view.x + box.width || x > view.x + w - box.width) view.x = x - w / 2;
  if (y < view.y + box.height || y > view.y + h - box.height) view.y = y - h / 2;
  draw();
}

const rowOf = index => document.getElementById("row-" + (index < 0 ? "image" : index));
const indexOf = element => {
  const row = element.closest(".row");
  return row && row.id !== "row-image" ? Number(row.id.slice(4)) : null;
};
function make(tag, text, kind) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (kind) element.className = kind;
  return element;
}
function link(index, text) {
  if (index < 0) return make("span", text);
  const a = make("a", text);
  a.href = "#row-" + index;
  return a;
}
function tell(index) {
  for (const marked of svg.querySelectorAll(".self, .source, .reader, .in, .out"))
    marked.classList.remove("self", "source", "reader", "in", "out");
  svg.classList.toggle("asked", index !== null);
  card.hidden = index === null;
  if (index === null) return;
  const row = rows[index];
  rowOf(index).classList.add("self");
  for (const [source] of row.sources) rowOf(source).classList.add("source");
  for (const [reader] of row.readers) rowOf(reader).classList.add("reader");
  for (const line of svg.querySelectorAll(`.line[data-to="${index}"]`)) line.classList.add("in");
  for (const line of svg.querySelectorAll(`.line[data-from="${index}"]`)) line.classList.add("out");
  const title = make("h2", row.title), list = make("dl");
  title.append(make("span", row.part, "part " + row.part));
  const add = (term, ...parts) => {
    const description = make("dd");
    description.append(...parts);
    list.append(make("dt", term), description);
  };
  for (const [source, name, shape] of row.sources) add("reads", link(source, name), make("span", shape, "shape"));
  if (row.arguments.length) {
    const given = make("span");
    row.arguments.forEach(([name, value], at) => given.append((at ? ", " : "") + name + " ", make("b", value)));
    add("with", given);
  }
  add("gives", make("b", row.output), make("span", row.stride ? "stride " + row.stride : "cells × numbers", "shape"));
  if (row.readers.length) {
    const readers = make("span");
    row.readers.forEach(([reader, name], at) => readers.append(at ? ", " : "", link(reader, name)));
    add("read by", readers);
  }
  add("parameters", make("b", row.params), make("span", row.params_share + " of all", "shape"));
  add("MACs", make("b", row.macs), make("span", row.macs_share + " of all", "shape"));
  card.replaceChildren(title, make("code", row.text), make("p", row.where, "where"), list);
  const box = rowOf(index).querySelector(".box").getBBox();
  const right = (box.x + box.width / 2 - view.x) * view.zoom > stage.clientWidth / 2;
  card.classList.toggle("left", right);
  card.classList.toggle("pinned", index === pinned);
}
function pin(index) {
  pinned = index;
  tell(index);
}
function follow() {
  const asked = /^#row-(\\d+)$/.exec(location.hash), index = asked ? Number(asked[1]) : null;
  if (index === null || index >= rows.length) return pin(null);
  bring(index);
  pin(index);
  rowOf(index).focus({ preventScroll: true });
}
const choose = index => {
  if (index === null) {
    history.replaceState(null, "", location.pathname + location.search);
    pin(null);
  } else if (location.hash === "#row-" + index) follow();
  else location.hash = "row-" + index;
};

const touching = new Map();
let moved = 0;
stage.addEventListener("pointerdown", event => {
  if (event.target.closest("aside")) return;
  touching.set(event.pointerId, event);
  moved = 0;
});
addEventListener("pointermove", event => {
  const before = touching.get(event.pointerId);
  if (!before) return;
  const dx = event.clientX - before.clientX, dy = event.clientY - before.clientY;
  moved += Math.abs(dx) + Math.abs(dy);
  if (touching.size === 1) pan(-dx, -dy);
  else {
    const other = [...touching.values()].find(touch => touch.pointerId !== event.pointerId);
    const apart = touch => Math.hypot(touch.clientX - other.clientX, touch.clientY - other.clientY);
    const corner = stage.getBoundingClientRect();
    zoomAt(apart(event) / Math.max(apart(before), 1), other.clientX - corner.left, other.clientY - corner.top);
  }
  touching.set(event.pointerId, event);
});
for (const name of ["pointerup", "pointercancel"]) addEventListener(name, event => touching.delete(event.pointerId));
stage.addEventListener("wheel", event => {
  event.preventDefault();
  const corner = stage.getBoundingClientRect(), lines = event.deltaMode ? 16 : 1;
  zoomAt(Math.exp(-event.deltaY * lines * 0.0015), event.clientX - corner.left, event.clientY - corner.top);
}, { passive: false });
svg.addEventListener("pointerover", event => { if (!touching.size) tell(indexOf(event.target) ?? pinned); });
svg.addEventListener("pointerleave", () => tell(pinned));
svg.addEventListener("click", event => { if (moved < 5) choose(indexOf(event.target)); });
for (const row of svg.querySelectorAll(".row:not(.image)")) {
  row.setAttribute("tabindex", "0");
  row.setAttribute("role", "button");
  row.setAttribute("aria-label", row.querySelector("title").textContent);
  row.querySelector("title").remove();  // the card says it
  row.addEventListener("focus", () => {
    if (!row.matches(":focus-visible")) return;
    bring(indexOf(row));
    tell(indexOf(row));
  });
}
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = 80, row = document.activeElement.closest(".row");
  const keys = {
    "+": () => zoomAt(1.25), "=": () => zoomAt(1.25), "-": () => zoomAt(0.8), "0": fit,
    ArrowLeft: () => pan(-step, 0), ArrowRight: () => pan(step, 0),
    ArrowUp: () => pan(0, -step), ArrowDown: () => pan(0, step),
    Escape: () => choose(null),
  };
  if (row) keys.Enter = keys[" "] = () => choose(indexOf(row));
  if (!(event.key in keys) || event.target.closest("button, a") && "Enter ".includes(event.key)) return;
  event.preventDefault();
  keys[event.key]();
});
document.getElementById("larger").onclick = () => zoomAt(1.25);
document.getElementById("smaller").onclick = () => zoomAt(0.8);
document.getElementById("fit").onclick = fit;
document.getElementById("scheme").onclick = () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.scheme = (root.dataset.scheme ?? (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
};
addEventListener("resize", draw);
addEventListener("hashchange", follow);
start();
follow();
"""

PAGE = Template(
    """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; $light}
@media (prefers-color-scheme: dark) { :root:not([data-scheme=light]) { color-scheme: dark; $dark} }
:root[data-scheme=dark] { color-scheme: dark; $dark}
$style
* { box-sizing: border-box }
html, body { height: 100%; margin: 0 }
body { display: flex; flex-direction: column; background: var(--paper); color: var(--ink);
  font: 14px/1.45 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 24px; padding: 10px 16px;
  border-bottom: 1px solid var(--band) }
h1 { font-size: 18px; margin: 0 } header p { margin: 0; color: var(--faint) }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0; padding: 0; list-style: none; color: var(--faint) }
.legend li { display: flex; align-items: center; gap: 6px }
.legend span { width: 20px; height: 12px; border: 1.5px solid; border-radius: 3px }
.legend .backbone span { background: var(--backbone); border-color: var(--backbone_edge) }
.legend .neck span { background: var(--neck); border-color: var(--neck_edge) }
.legend .head span { background: var(--head); border-color: var(--head_edge) }
.legend .open span { border: 2px dashed var(--choice) }
.legend .bar span { height: 3px; border: 0; background: var(--neck_edge) }
.tools { margin-left: auto; display: flex; gap: 6px }
button { font: inherit; min-width: 34px; padding: 3px 10px; color: var(--ink); background: var(--band);
  border: 1px solid var(--wire); border-radius: 6px; cursor: pointer }
button:hover { border-color: var(--ink) }
:focus-visible { outline: 2px solid var(--source); outline-offset: 1px }
#stage { position: relative; flex: 1; min-height: 0; overflow: hidden; touch-action: none; cursor: grab }
#stage:active { cursor: grabbing }
#stage svg { display: block; width: 100%; height: 100%; user-select: none }
.row:not(.image) { cursor: pointer; outline: none }
.asked .row, .asked .line { opacity: .36 }
.asked :is(.self, .source, .reader, .in, .out) { opacity: 1 }
.self .box, .row:focus-visible .box { stroke: var(--ink); stroke-width: 2.6 }
.source .box { stroke: var(--source); stroke-width: 2.6 } .reader .box { stroke: var(--reader); stroke-width: 2.6 }
.in .wire { stroke: var(--source); stroke-width: 2.4 } .in .tip { fill: var(--source) }
.out .wire { stroke: var(--reader); stroke-width: 2.4 } .out .tip { fill: var(--reader) }
#card { position: absolute; right: 16px; top: 16px; width: 380px; max-width: calc(100% - 32px);
  max-height: calc(100% - 32px); overflow: auto; padding: 14px 16px; background: var(--paper);
  border: 1px solid var(--wire); border-radius: 10px; box-shadow: 0 6px 24px #0004; pointer-events: none; cursor: auto }
#card.left { right: auto; left: 16px } #card.pinned { pointer-events: auto } #card[hidden] { display: none }
@media (max-width: 760px) {
  #card, #card.left { left: 8px; right: 8px; top: auto; bottom: 8px; width: auto; max-width: none; max-height: 45% }
}
#card h2 { display: flex; justify-content: space-between; align-items: baseline; gap: 12px; margin: 0 0 8px;
  font-size: 16px }
#card code { display: block; padding: 6px 8px; background: var(--band); border-radius: 6px;
  font: 12px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere }
#card .where { margin: 4px 0 10px; color: var(--faint); font-size: 12px; overflow-wrap: anywhere }
#card .part { padding: 0 8px; border: 1px solid; border-radius: 9px; font-size: 12px; font-weight: 400 }
#card .backbone { color: var(--backbone_edge) } #card .neck { color: var(--neck_edge) }
#card .head { color: var(--head_edge) }
#card dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 12px; margin: 0 }
#card dt { color: var(--faint) }
#card dd { margin: 0; display: flex; justify-content: space-between; gap: 10px; overflow-wrap: anywhere }
#card a { color: var(--source) } #card .shape { color: var(--faint); white-space: nowrap }
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>$sums</p>
<ul class="legend">$legend</ul>
<div class="tools">
<button id="smaller" title="Smaller (-)" aria-label="Smaller">−</button>
<button id="larger" title="Larger (+)" aria-label="Larger">+</button>
<button id="fit" title="Whole picture (0)">Fit</button>
<button id="scheme" title="Light or dark">Light / dark</button>
</div>
</header>
<main id="stage">
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 $width $height" role="group" aria-label="$title">
$picture
</svg>
<aside id="card" aria-live="polite" hidden></aside>
</main>
<script type="application/json" id="facts">$facts</script>
<script>$script</script>
</body>
</html>
"""
)
