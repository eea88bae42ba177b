"""The page around the parts of a search's report (`search.report`): its style, its script, and the frame of it all."""

from __future__ import annotations

from string import Template

LIGHT = {
    "budget": "#c92a2a", "warn": "#8a4b00", "warned": "#fff4e0", "soft": "#f7f9fb", "edge": "#d9dfe7",
    "c0": "#1a66d6", "c1": "#d9480f", "c2": "#23804f", "c3": "#b3137c", "c4": "#8a6a00", "c5": "#007a86",
    "c6": "#6545c4", "c7": "#7d4a2a",
}  # fmt: skip
DARK = {
    "budget": "#ff8080", "warn": "#ffc069", "warned": "#33270f", "soft": "#171d25", "edge": "#2c3541",
    "c0": "#7ab0ff", "c1": "#ff9d5c", "c2": "#57c08a", "c3": "#ff7ac6", "c4": "#e0c04a", "c5": "#4fd0da",
    "c6": "#b39dff", "c7": "#d6a585",
}  # fmt: skip

STYLE = """
* { box-sizing: border-box }
html { scroll-padding-top: 52px; -webkit-text-size-adjust: 100% }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
header, main, footer { max-width: 1240px; margin: 0 auto; padding: 0 20px }
header { padding-top: 22px } header p { max-width: none }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 20px; margin: 0 0 6px }
h3 { font-size: 16px; margin: 18px 0 4px } .card h3, .caution h3 { margin: 0 }
p { margin: 0 0 10px; max-width: 78ch }
a { color: var(--source) }
.faint { color: var(--faint) }
code, pre { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere }
nav { position: sticky; top: 0; z-index: 2; background: var(--paper); border-bottom: 1px solid var(--edge) }
nav div { max-width: 1240px; margin: 0 auto; padding: 8px 20px; display: flex; gap: 4px 18px; overflow-x: auto;
  white-space: nowrap; align-items: center; scrollbar-width: none }
nav button { margin-left: auto }
button { font: inherit; font-size: 13px; padding: 2px 10px; color: var(--ink); background: var(--band);
  border: 1px solid var(--edge); border-radius: 6px; cursor: pointer }
button:hover { border-color: var(--ink) }
:focus-visible { outline: 2px solid var(--source); outline-offset: 2px; border-radius: 3px }
section { padding: 26px 0 8px; border-top: 1px solid var(--edge) }
section:first-of-type { border: 0 }
.lead { font-size: 17px }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 14px 0 }
.tiles div { padding: 10px 14px; background: var(--soft); border: 1px solid var(--edge); border-radius: 10px }
.tiles b { display: block; font-size: 22px; line-height: 1.25 }
.tiles span { color: var(--faint); font-size: 13px }
.caution { padding: 12px 18px; margin: 14px 0; background: var(--warned); border-left: 4px solid var(--warn);
  border-radius: 4px }
.caution h3 { color: var(--warn) } .caution ul { margin: 6px 0 0; padding-left: 18px; max-width: 90ch }
.absent { color: var(--faint); font-style: italic }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 10px 18px }
.smalls { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(270px, 100%), 1fr)); gap: 14px 18px }
.smalls figure { display: flex; flex-direction: column; justify-content: space-between; padding: 8px 8px 2px;
  border: 1px solid var(--edge); border-radius: 8px }
figure { margin: 0 }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 8px; align-items: baseline; font-size: 13px }
.plot { display: block; width: 100%; height: auto; max-width: 620px; overflow: visible }
.scatter, .rows { max-width: 460px }
.word { display: inline-block; max-width: 100% }
.plot text { fill: var(--ink); font-size: 11px }
.tick { fill: var(--faint) !important } .axis { fill: var(--ink) } .grid { stroke: var(--edge); stroke-width: 1 }
.budget, .start { stroke: var(--budget); stroke-width: 1.5; stroke-dasharray: 6 4 }
.start { stroke: var(--faint); stroke-dasharray: 2 3 }
.plot .budget-name { fill: var(--budget) }
.cloud { stroke: var(--wire); stroke-width: 3.4; stroke-linecap: round; opacity: .5; fill: none }
.front-line { fill: none; stroke: var(--source); stroke-width: 1.6; opacity: .7 }
.tie { fill: none; stroke: var(--choice); stroke-width: 1.6; stroke-dasharray: 2 3; opacity: .85 }
.reach { fill: transparent }
.error { fill: none; stroke: var(--wire); stroke-width: 1.1; opacity: .3 }
.judged .shape { fill: var(--wire); stroke: var(--paper); stroke-width: 1 }
.front .shape { fill: var(--source); stroke: var(--paper); stroke-width: 1.2 }
.front .error { stroke: var(--source); opacity: .75 }
.tied .shape { fill: var(--paper); stroke: var(--source); stroke-width: 2 }
.best .shape { fill: var(--reader); stroke: var(--paper) } .best .error { stroke: var(--reader) }
.best.tied .shape { fill: var(--paper); stroke: var(--reader); stroke-width: 2 }
.mark { cursor: pointer }
.mark.told .shape { stroke: var(--ink); stroke-width: 2.6 }
.told-dot { fill: var(--ink) }
.diagonal { stroke: var(--faint); stroke-dasharray: 5 4 }
.again { fill: none; stroke: var(--source); stroke-width: 1.3 }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round }
.curve.taken { stroke-width: 3 } .dashed { stroke-dasharray: 5 4 } .pointer { fill: none; opacity: .45 }
.level-line { stroke: var(--faint); stroke-dasharray: 1 4 }
.between { stroke: var(--wire) }
.stage { stroke: var(--paper); stroke-width: 1 } .stage .ring { fill: var(--paper) !important; stroke-width: 2 }
.legend { display: flex; flex-wrap: wrap; gap: 2px 20px; margin: 4px 0 8px; padding: 0; list-style: none;
  font-size: 13px }
.legend li { display: flex; gap: 6px; align-items: center } .legend svg { width: 22px; height: 22px; flex: none }
.badge { display: inline-block; padding: 0 8px; border: 1px solid var(--wire); border-radius: 10px; font-size: 12px;
  color: var(--faint); white-space: nowrap }
.badge.best { color: var(--reader); border-color: var(--reader) }
.badge.tied, .badge.undecided { color: var(--choice); border-color: var(--choice) }
.badge.front, .badge.knee { color: var(--source); border-color: var(--source) }
.scroll { overflow-x: auto; margin: 6px 0 14px }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums }
th, td { padding: 4px 12px 4px 0; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--edge) }
th { font-weight: 600; color: var(--faint); white-space: nowrap }
td.n, th.n { text-align: right } td.n { white-space: nowrap }
.sortable th { cursor: pointer } .sortable th[data-order]::after { content: " ▾" }
.sortable th[data-order=up]::after { content: " ▴" }
tr.off td { color: var(--faint) }
details { margin: 6px 0 12px } summary { cursor: pointer; color: var(--source) }
pre { margin: 6px 0; padding: 10px 12px; background: var(--band); border-radius: 8px; overflow: auto;
  white-space: pre-wrap }
pre.yaml { white-space: pre; max-height: 420px; overflow-wrap: normal }
.copied { display: flex; gap: 8px; align-items: flex-start; margin-bottom: 12px }
.copied pre { flex: 1; margin: 0; min-width: 0 }
.card { padding: 16px 18px; margin: 14px 0; border: 1px solid var(--edge); border-radius: 12px;
  background: var(--soft) }
.card:target { border-color: var(--source); box-shadow: 0 0 0 1px var(--source) }
.card > header { display: flex; flex-wrap: wrap; gap: 4px 12px; align-items: baseline; padding: 0; max-width: none }
.card .two { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 560px); gap: 8px 26px; margin-top: 8px }
.card table { font-size: 13px } .card mark { background: none; color: var(--reader); font-weight: 700 }
.card small { color: var(--faint) }
.detector { display: block; width: 100%; height: auto; max-height: 620px }
.detector .band { fill: var(--band) } .detector .wire { fill: none; stroke: var(--wire); stroke-width: 2; opacity: .7 }
.detector .box { fill: var(--paper); stroke: var(--edge); stroke-width: 2 }
.detector text { font-size: 18px; fill: var(--faint) } .detector .stride { font-size: 22px }
.searched .box { fill: var(--neck) !important; stroke: var(--neck_edge) !important }
.searched.other .box { stroke: var(--reader) !important; stroke-width: 4 !important }
.searched .op { font-size: 18px } .searched .picks { fill: var(--ink); font-size: 27px; font-weight: 700 }
.strip { display: flex; flex-wrap: wrap; gap: 8px; align-content: flex-start }
.strip div { padding: 6px 12px; border: 1.5px solid var(--neck_edge); background: var(--neck); border-radius: 8px }
.strip .other { border-color: var(--reader) } .strip b { display: block; font-size: 16px }
#tip { position: absolute; z-index: 3; width: max-content; max-width: min(330px, calc(100vw - 24px));
  padding: 10px 12px; background: var(--paper); border: 1px solid var(--wire); border-radius: 8px;
  box-shadow: 0 6px 24px #0004;
  font-size: 13px; line-height: 1.4; pointer-events: none }
#tip[hidden] { display: none } #tip b { display: block } #tip.held { pointer-events: auto }
#tip dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 10px; margin: 2px 0 }
#tip dt { color: var(--faint) } #tip dd { margin: 0; overflow-wrap: anywhere }
.defs { position: absolute; width: 0; height: 0 }
.c0 { stroke: var(--c0) } .c1 { stroke: var(--c1) } .c2 { stroke: var(--c2) } .c3 { stroke: var(--c3) }
.c4 { stroke: var(--c4) } .c5 { stroke: var(--c5) } .c6 { stroke: var(--c6) } .c7 { stroke: var(--c7) }
.s0 { fill: var(--c4) } .s1 { fill: var(--c0) } .s2 { fill: var(--c3) } .s3 { fill: var(--c2) }
.s0 .ring { stroke: var(--c4) } .name.taken { font-weight: 700 }
footer { padding-top: 20px; padding-bottom: 40px; color: var(--faint); font-size: 13px }
@media (max-width: 860px) { .card .two { grid-template-columns: minmax(0, 1fr) } }
@media (max-width: 600px) {
  header, main, footer, nav div { padding-left: 14px; padding-right: 14px }
  h1 { font-size: 21px } .lead { font-size: 16px } .card { padding: 12px }
  .diagram { overflow-x: auto } .detector { min-width: 440px; max-height: none }
  .tiles { grid-template-columns: repeat(2, 1fr) } .tiles b { font-size: 19px }
  .copied { flex-direction: column }
}
@media print {
  nav, button, #tip { display: none !important } body { font-size: 11px } .lead { font-size: 12px }
  .card, figure, tr, .caution { break-inside: avoid } h2, h3 { break-after: avoid }
  .scroll { overflow: visible } table, figcaption, .legend, .badge { font-size: 9px } th, td { padding-right: 8px }
  .panels { grid-template-columns: repeat(3, minmax(0, 1fr)) }
  .smalls { grid-template-columns: repeat(4, minmax(0, 1fr)) } .tiles b { font-size: 14px }
  .card .two { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr) } .detector { max-height: 340px }
}
"""

SCRIPT = """
"use strict";
const facts = JSON.parse(document.getElementById("facts").textContent);
const tip = document.getElementById("tip");
let held = null;  // the subnet whose note stays after a tap

function make(tag, text) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  return element;
}
function options(number) {  // mixed radix, the last choice moving fastest
  const found = [];
  for (const [name, values] of [...facts.choices].reverse()) {
    found.unshift([name, values[number % values.length]]);
    number = Math.floor(number / values.length);
  }
  return found;
}
function note(number, lines, x, y, hold) {
  const known = facts.subnets[number], list = make("dl");
  for (const [term, value] of known ? known.lines : lines) list.append(make("dt", term), make("dd", value));
  const picks = make("dl");
  for (const [term, value] of known ? known.picks : options(number)) picks.append(make("dt", term), make("dd", value));
  tip.replaceChildren(make("b", known ? known.title : "Subnet " + number), list, picks);
  if (known && known.card && hold) {
    const link = make("a", "to its card");
    link.href = "#subnet-" + number;
    tip.append(link);
  }
  tip.hidden = false;
  tip.classList.toggle("held", Boolean(hold));
  const wide = document.documentElement.clientWidth, box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(x + 16, wide - box.width - 8)) + scrollX + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? Math.max(y - box.height - 14, 4) : y + 18) + scrollY + "px";
  mark(number);
}
function mark(number) {
  for (const told of document.querySelectorAll(".told")) told.classList.remove("told");
  for (const dot of document.querySelectorAll(".told-dot")) dot.remove();
  if (number === null) return;
  for (const same of document.querySelectorAll(`[data-subnet="${number}"]`)) same.classList.add("told");
}
function hush() { tip.hidden = true; held = null; mark(null); }

function nearest(svg, event) {  // the dot of the cloud under the pointer
  const [left, right, top, bottom, x0, x1, y0, y1] = svg.dataset.frame.split(" ").map(Number);
  const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  const xs = facts.cloud[svg.dataset.metric], ys = facts.cloud.loss;
  const across = (right - left) / (x1 - x0), up = (bottom - top) / (y1 - y0);
  const at = i => [left + (xs[i] - x0) * across, bottom - (ys[i] - y0) * up];
  let best = -1, least = 12 * 12;
  for (let i = 0; i < ys.length; i++) {
    const [x, y] = at(i), apart = (x - place.x) ** 2 + (y - place.y) ** 2;
    if (apart < least) { least = apart; best = i; }
  }
  return best < 0 ? null : { number: facts.cloud.subnet[best], lines: facts.cloud.names.map(
    name => [facts.cloud.titles[name], written(name, facts.cloud[name][best])]), at: at(best) };
}
function written(name, value) {
  if (name === "loss") return value.toFixed(4);
  if (name.startsWith("latency")) return value.toPrecision(3) + " ms";
  return value >= 1e9 ? (value / 1e9).toFixed(3) + "G" : (value / 1e6).toFixed(3) + "M";
}
function tell(event, hold) {
  const known = event.target.closest("[data-subnet]"), svg = event.target.closest(".scatter[data-frame]");
  if (known) return note(Number(known.dataset.subnet), [], event.clientX, event.clientY, hold), true;
  const found = svg && nearest(svg, event);
  if (!found) return false;
  note(found.number, found.lines, event.clientX, event.clientY, hold);
  const dot = document.createElementNS(svg.namespaceURI, "circle");
  dot.setAttribute("class", "told-dot");
  dot.setAttribute("cx", found.at[0]); dot.setAttribute("cy", found.at[1]); dot.setAttribute("r", 4.5);
  svg.append(dot);
  return true;
}
for (const svg of document.querySelectorAll(".scatter")) {
  let touched = false;
  svg.addEventListener("pointerdown", event => { touched = event.pointerType !== "mouse"; });
  svg.addEventListener("pointermove", event => {
    if (event.pointerType === "mouse" && !tell(event, false)) hush();
  });
  svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hush(); });
  svg.addEventListener("click", event => {
    if (!touched) return;  // a click follows the link to the card, a tap shows the note first
    event.preventDefault();
    if (!tell(event, true)) hush();
    event.stopPropagation();
  });
  svg.addEventListener("focusin", event => {
    const known = event.target.querySelector && event.target.querySelector("[data-subnet]");
    if (!known || !event.target.matches(":focus-visible")) return;
    const box = known.getBoundingClientRect();
    note(Number(known.dataset.subnet), [], box.right, box.bottom, false);
  });
}
addEventListener("click", event => { if (!event.target.closest("#tip") || event.target.closest("a")) hush(); });
addEventListener("keydown", event => { if (event.key === "Escape") hush(); });

for (const table of document.querySelectorAll(".sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const up = head.dataset.order === "down";
    for (const other of heads) delete other.dataset.order;
    head.dataset.order = up ? "up" : "down";
    const value = row => {
      const data = row.cells[column].querySelector("data");
      return data ? Number(data.value) : row.cells[column].textContent;
    };
    const body = table.tBodies[0], sign = up ? 1 : -1;
    const order = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
    body.append(...[...body.rows].sort((a, b) => sign * order(value(a), value(b))));
  }));
}
for (const button of document.querySelectorAll("button.copy")) button.addEventListener("click", () => {
  const text = button.parentElement.querySelector("pre");
  const done = () => { button.textContent = "copied"; setTimeout(() => { button.textContent = "copy"; }, 1500); };
  const by_hand = () => {
    getSelection().selectAllChildren(text);
    if (document.execCommand("copy")) done();
  };
  if (navigator.clipboard) navigator.clipboard.writeText(text.textContent).then(done, by_hand);
  else by_hand();
});
document.getElementById("scheme").onclick = () => {
  const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.scheme = (root.dataset.scheme ?? (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
};
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
@media screen and (prefers-color-scheme: dark) { :root:not([data-scheme=light]) { color-scheme: dark; $dark} }
@media screen { :root[data-scheme=dark] { color-scheme: dark; $dark} }
$style</style>
</head>
<body>
<header><h1>$title</h1><p class="faint">$under</p></header>
<nav aria-label="Parts of this page"><div>$links<button id="scheme" type="button">light / dark</button></div></nav>
<main>
$sections
</main>
<footer><p>$foot</p></footer>
<div id="tip" role="status" hidden></div>
<script type="application/json" id="facts">$facts</script>
<script>$script</script>
</body>
</html>
"""
)
