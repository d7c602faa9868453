"""How a page looks, in light and dark, on a phone and on paper, and the few lines of script that sort and open.

Colours are CSS variables. A browser that knows none of them takes the light values, which stand before each.
"""

import re

NUM_COLOURS = 6
# The curves' colours differ by more than 20 (CIE76) for every kind of colour vision, and each has its own dashes.
LIGHT = {
    **{"ink": "#1d2733", "soft": "#5b6776", "line": "#dfe4ea", "accent": "#1f3a5f", "paper": "#ffffff"},
    **{"page": "#f3f5f8", "top": "#1f3a5f", "top-ink": "#ffffff", "top-soft": "#cfdae8", "good": "#2f7a58"},
    **{"warn": "#fff4e5", "warn-line": "#f0c48a", "grid": "#e3e8ee", "mark": "#8793a1", "heat": "31,58,95"},
    **{"c0": "#1f3a5f", "c1": "#c8620c", "c2": "#12876b", "c3": "#b65bc8", "c4": "#59330c", "c5": "#7a1ed5"},
}
DARK = {
    **{"ink": "#e4eaf1", "soft": "#a3b0bf", "line": "#2d3845", "accent": "#9cc4f5", "paper": "#161d27"},
    **{"page": "#0d1218", "top": "#14263d", "top-ink": "#ffffff", "top-soft": "#b9c9dc", "good": "#6fcf9f"},
    **{"warn": "#33260f", "warn-line": "#7d5f26", "grid": "#2a3441", "mark": "#7c8a9a", "heat": "125,180,240"},
    **{"c0": "#9cc4f5", "c1": "#ef8f3c", "c2": "#3fbf95", "c3": "#d51e98", "c4": "#efef92", "c5": "#a969e9"},
}
DASHES = ("none", "8 3", "3 2.5", "10 3 2 3", "1.5 3", "6 2 1.5 2 1.5 2")
RULES = """
* { box-sizing: border-box; }
html { scroll-padding-top: 64px; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
header { background: var(--top); color: var(--top-ink); padding: 28px 0 22px; }
header h1 { margin: 0 0 4px; font-size: 27px; font-weight: 650; letter-spacing: -.01em; overflow-wrap: anywhere; }
header p { margin: 0; color: var(--top-soft); overflow-wrap: anywhere; }
.wrap { max-width: 1120px; margin: 0 auto; padding: 0 28px; }
nav { background: var(--paper); border-bottom: 1px solid var(--line); position: sticky; top: 0; z-index: 3; }
nav .wrap { display: flex; flex-wrap: wrap; gap: 4px 22px; padding-top: 10px; padding-bottom: 10px; }
a { color: var(--accent); }
nav a { margin-right: 8px; text-decoration: none; font-size: 14px; }
nav a:hover { text-decoration: underline; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; margin: 22px 0;
  padding: 22px 26px; }
section h2 { margin: 0 0 4px; font-size: 20px; font-weight: 650; overflow-wrap: anywhere; }
section li { overflow-wrap: anywhere; }
section > p.about { margin: 0 0 16px; color: var(--soft); max-width: 86ch; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px; margin: 16px 0 4px; }
.card { border: 1px solid var(--line); border-left: 5px solid var(--mark); border-radius: 8px; padding: 12px 16px; }
.card b { display: block; font-size: 28px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13.5px; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; }
th { color: var(--soft); font-weight: 600; font-size: 13px; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 116px; }
tr.total td { font-weight: 650; border-top: 2px solid var(--ink); border-bottom: 0; }
table.text td, table.text th { text-align: left; }
table.text td:last-child { font: 13px monospace; word-break: break-all; }
td small, th small { color: var(--soft); font-weight: 400; white-space: nowrap; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 2px 0; cursor: pointer;
  text-align: inherit; }
th button:after { content: "\\a0\\2195"; opacity: .55; }
th[aria-sort=ascending] button:after { content: "\\a0\\2191"; opacity: 1; }
th[aria-sort=descending] button:after { content: "\\a0\\2193"; opacity: 1; }
a:focus-visible, button:focus-visible, summary:focus-visible, .pair:focus-visible { outline: 3px solid var(--c1);
  outline-offset: 2px; }
.scroll { overflow-x: auto; }
/* A shade at the edge behind which there is more; what scrolls with the table covers it where there is not. */
.scroll, .tall {
  background: linear-gradient(to right, var(--paper) 18px, transparent) left / 36px calc(100% + 2px) no-repeat local,
    linear-gradient(to left, var(--paper) 18px, transparent) right / 36px calc(100% + 2px) no-repeat local,
    linear-gradient(to right, var(--mark), transparent) left / 14px 100% no-repeat scroll,
    linear-gradient(to left, var(--mark), transparent) right / 14px 100% no-repeat scroll; }
.tall { max-height: 620px; overflow: auto; }
.tall th { position: sticky; top: 0; background: var(--paper); z-index: 2; }
.scores th:first-child, .scores td:first-child { position: sticky; left: 0; z-index: 1; background: var(--paper);
  min-width: 156px; max-width: 260px; }
.scores th, .scores td { padding: 6px 7px; }
.tall .scores th:first-child { z-index: 3; }
.scores .bars { padding: 0 4px; width: 32%; min-width: 140px; text-align: left; vertical-align: middle; }
.scores th.bars { vertical-align: bottom; }
.scores td + td + td { white-space: nowrap; }
img { display: block; max-width: 100%; height: auto; margin: 10px auto; }
.legend { list-style: none; margin: 0 0 10px; padding: 0; color: var(--ink); }
.legend li { display: inline-block; margin: 0 20px 4px 0; max-width: 100%; overflow-wrap: anywhere; }
svg { display: block; }
svg.key { display: inline-block; width: 28px; height: 10px; vertical-align: middle; margin-right: 5px; }
th svg.key { display: block; margin: 0 0 3px auto; }
svg.row { width: 100%; overflow: visible; }
svg text { fill: var(--soft); font: 12px system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
svg .grid { stroke: var(--grid); stroke-width: 1; fill: none; }
svg .chance { stroke: var(--mark); stroke-width: 1.2; fill: none; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .thin { fill: none; stroke-width: 1; opacity: .45; }
svg .chance { opacity: 1; }
svg .ring { fill: var(--paper); stroke-width: 2.5; }
details p { color: var(--soft); font-size: 13px; margin: 4px 0; overflow-wrap: anywhere; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(270px, 100%), 1fr)); gap: 16px 22px; }
section > p.note { margin: 8px 0 0; color: var(--soft); font-size: 13.5px; }
.plots + .scroll { margin-top: 14px; }
.plots figure { margin: 0; max-width: 430px; min-width: 0; }
.plots svg.plot { width: 100%; height: auto; }
.plots figcaption { font-size: 13.5px; color: var(--soft); }
.plots figcaption b { color: var(--ink); margin-right: 10px; }
.plots figcaption span { display: inline-block; max-width: 100%; overflow-wrap: anywhere; margin-right: 12px;
  font-variant-numeric: tabular-nums; }
details { border-top: 1px solid var(--line); scroll-margin-top: 60px; }
summary { cursor: pointer; padding: 10px 0; overflow-wrap: anywhere; }
summary b { font-size: 16px; margin-right: 10px; }
summary span { color: var(--soft); font-size: 13.5px; }
details > div { padding: 4px 0 18px; scroll-margin-top: 110px; }
.tools button { font: inherit; color: var(--accent); background: var(--paper); border: 1px solid var(--mark);
  border-radius: 6px; padding: 4px 12px; cursor: pointer; }
.kinds { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(270px, 100%), 1fr)); gap: 4px 22px;
  margin-top: 14px; }
.kinds h4, .row h4 { margin: 6px 0 2px; font-size: 14px; overflow-wrap: anywhere; }
.pair { margin: 0 0 10px; cursor: zoom-in; }
.pair > div, .row > div { display: flex; gap: 4px; }
.pair img { width: 49%; margin: 2px 0; border-radius: 4px; background: #000; }
figcaption { color: var(--soft); font-size: 13px; line-height: 1.35; overflow-wrap: anywhere; }
.row > div { flex-wrap: wrap; gap: 6px; }
.row figure { margin: 0 4px 8px 0; width: 190px; max-width: calc(50% - 10px); }
.row img { width: 100%; margin: 2px 0; border-radius: 4px; background: #000; }
dialog { border: 1px solid var(--mark); border-radius: 10px; padding: 16px; background: var(--paper); color: var(--ink);
  width: 940px; max-width: 94vw; }
dialog::backdrop { background: rgba(0, 0, 0, .65); }
dialog .pair { cursor: auto; }
dialog button { font: inherit; padding: 4px 14px; }
.warning { background: var(--warn); border: 1px solid var(--warn-line); border-radius: 8px; padding: 10px 16px;
  margin: 20px 0 0; }
footer { color: var(--soft); font-size: 13.5px; padding: 6px 0 40px; }
@media (max-width: 700px) {
  nav { position: static; }
  html { scroll-padding-top: 8px; }
  .wrap { padding: 0 12px; }
  section { padding: 16px 14px; }
  table { font-size: 13px; }
  th, td, .scores th, .scores td { padding: 5px 4px; }
  .scores .bars { padding: 0 2px; min-width: 104px; }
  .scores th:first-child, .scores td:first-child { max-width: 150px; }
  .sortable th:first-child, .sortable td:first-child { min-width: 140px; }
  dialog .pair > div { display: block; }
  dialog .pair img { width: 100%; }
}
@media print {
  body { background: none; }
  nav, .tools, th button:after { display: none; }
  section { border: 0; padding: 8px 0; margin: 8px 0; }
  header { padding: 8px 0; background: none; color: var(--ink); }
  header p { color: var(--soft); }
  .tall { max-height: none; }
  table { font-size: 10.5px; }
  th, td, .scores th, .scores td { padding: 3px; font-size: inherit; }
  .scroll, .tall { overflow: visible; background: none; }
  .scores th:first-child, .scores td:first-child, .tall th { position: static; }
  .scores th:first-child, .scores td:first-child { min-width: 118px; }
  .scores .bars { width: 20%; min-width: 90px; }
  tfoot { display: table-row-group; }
  tr, figure, summary { break-inside: avoid; }
  h2, h4, summary { break-after: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
SCRIPT = """
(function () {
  var all = function (what, where) { return Array.from((where || document).querySelectorAll(what)); };
  all("table.sortable").forEach(function (table) {
    var body = table.tBodies[0], rows = Array.from(body.rows), heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach(function (th, place) {
      var text = function (row) { return ((row.cells[place].firstChild || {}).textContent || "").trim(); };
      var number = function (row) { return parseFloat(text(row).replace(/,/g, "")); };
      var texts = rows.map(text);
      if (!texts.join("")) return;
      var numeric = place > 0 && texts.every(function (one) { return /^([-+]?[0-9.]|-?$)/.test(one); });
      var button = document.createElement("button");
      button.type = "button";
      while (th.firstChild) button.appendChild(th.firstChild);
      th.appendChild(button);
      th.setAttribute("aria-sort", "none");
      var order = numeric ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
      button.addEventListener("click", function () {
        var next = order[(order.indexOf(th.getAttribute("aria-sort")) + 1) % 3];
        heads.forEach(function (one) { if (one.hasAttribute("aria-sort")) one.setAttribute("aria-sort", "none"); });
        th.setAttribute("aria-sort", next);
        var sign = next === "ascending" ? 1 : -1, sorted = rows.slice();
        if (next !== "none") sorted.sort(function (one, other) {
          if (!numeric) return sign * text(one).localeCompare(text(other), undefined, { numeric: true });
          var a = number(one), b = number(other);
          return isNaN(a) || isNaN(b) ? isNaN(a) - isNaN(b) : sign * (a - b);
        });
        sorted.forEach(function (row) { body.appendChild(row); });
      });
    });
  });
  var panels = all("details");
  var reveal = function () {
    var target = document.getElementById(location.hash.slice(1)), panel = target && target.closest("details");
    if (panel) { panel.open = true; panel.scrollIntoView(); panel.querySelector("summary").focus(); }
  };
  addEventListener("hashchange", reveal);
  all("a[href^='#']").forEach(function (link) { link.addEventListener("click", function () { setTimeout(reveal); }); });
  reveal();
  all(".tools").forEach(function (place) {
    var button = document.createElement("button"), open = true;
    button.type = "button";
    var say = function () { button.textContent = open ? "Open all labels" : "Close all labels"; };
    button.addEventListener("click", function () {
      panels.forEach(function (one) { one.open = open; });
      open = !open;
      say();
    });
    say();
    place.appendChild(button);
  });
  var closed = [];
  addEventListener("beforeprint", function () {
    closed = panels.filter(function (one) { return !one.open; });
    closed.forEach(function (one) { one.open = true; });
  });
  addEventListener("afterprint", function () { closed.forEach(function (one) { one.open = false; }); });
  var box = document.createElement("dialog");
  if (!box.showModal) return;
  box.setAttribute("aria-label", "Image and map");
  document.body.appendChild(box);
  box.addEventListener("click", function (event) { if (event.target.closest("img") === null) box.close(); });
  all(".pair").forEach(function (pair) {
    var show = function () {
      var copy = pair.cloneNode(true), button = document.createElement("button");
      ["tabindex", "role"].forEach(function (name) { copy.removeAttribute(name); });
      button.textContent = "Close";
      box.replaceChildren(copy, button);
      box.showModal();
    };
    pair.tabIndex = 0;
    pair.setAttribute("role", "button");
    pair.addEventListener("click", show);
    pair.addEventListener("keydown", function (event) {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); show(); }
    });
  });
})();
"""


def _variables(palette: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in palette.items())


def _series() -> str:
    return "\n".join(
        f".card.c{place} {{ border-left-color: var(--c{place}); }} svg .c{place} {{ stroke: var(--c{place}); }} "
        f"svg .dot.c{place} {{ fill: var(--c{place}); }} svg .line.c{place} {{ stroke-dasharray: {DASHES[place]}; }}"
        for place in range(NUM_COLOURS)
    )


def with_light_values(rules: str) -> str:
    """The rules, before each declaration with a colour's variable the same one with its light value."""

    def both(match: re.Match[str]) -> str:
        plain = re.sub(r"var\(--([\w-]+)\)", lambda name: LIGHT[name[1]], match[0])
        return f"{plain} {match[0].strip()}"

    return re.sub(r"[\w-]+: [^:;{}]*var\(--[^;{}]*;", both, rules)


STYLE = (
    f":root {{ color-scheme: light; {_variables(LIGHT)} }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {_variables(DARK)} }} }}"
    + with_light_values(RULES + _series())
)
