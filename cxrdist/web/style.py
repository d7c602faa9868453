"""How the page looks, in light and in dark, and what it does in the browser beside what Gradio does."""

CSS = """
.gradio-container { --cx-fill: #4a78ae; --cx-band: #f0bf94; --cx-tick: #a8520f; --cx-positive: #a3260f;
  --cx-a: #1f6f54; --cx-b: #7a4fa3; --cx-track: #e3e8ef; --cx-warn: #fff4e5; --cx-warn-line: #f0c48a;
  --cx-warn-ink: #4d3208; --cx-soft: #4d5a69; }
.gradio-container .fillable { max-width: 1320px !important; padding: 16px !important; }
.cx > .html-container { padding: 0 !important; }
.dark .gradio-container, .gradio-container.dark { --cx-fill: #6fa3dc; --cx-band: #8a5f2e;
  --cx-tick: #ffb35c; --cx-positive: #ff9a85; --cx-a: #56c29b; --cx-b: #c39bea; --cx-track: #39424f;
  --cx-warn: #3a2c12; --cx-warn-line: #8a6a2c; --cx-warn-ink: #ffe2b0; --cx-soft: #b4bfcc; }
.cx h1 { font-size: 26px; font-weight: 650; margin: 4px 0 0; color: var(--body-text-color); }
.cx h2 { font-size: 18px; font-weight: 650; margin: 0 0 4px; color: var(--body-text-color); overflow-wrap: anywhere; }
.cx p, .cx li, .cx summary, .cx figcaption { color: var(--body-text-color); overflow-wrap: anywhere; }
.cx .cx-head p, .cx .cx-soft, .cx figcaption { color: var(--cx-soft); font-size: 14px; margin: 2px 0 8px; }
.cx .cx-warning { background: var(--cx-warn); border: 1px solid var(--cx-warn-line); color: var(--cx-warn-ink);
  border-radius: 8px; padding: 10px 16px; margin: 10px 0 0; font-weight: 550; }
.cx .cx-status { margin: 0; font-size: 15px; }
.cx .cx-wrong { border-left: 5px solid var(--cx-positive); padding: 8px 12px; background: var(--cx-track); }
.cx .cx-empty { padding: 40px 16px; text-align: center; border: 1px dashed var(--border-color-primary);
  border-radius: 8px; color: var(--cx-soft); }
.cx ol.cx-list, .cx ul.cx-keys { list-style: none; margin: 0; padding: 0; }
.cx ul.cx-keys { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 8px; font-size: 14px; }
.cx .cx-key { display: inline-block; width: 14px; height: 8px; border-radius: 3px; margin-right: 6px; }
.cx .cx-row { display: block; width: 100%; text-align: left; padding: 7px 10px; margin: 0 0 3px; border-radius: 8px;
  border: 1px solid transparent; background: transparent; color: var(--body-text-color); font-size: 15px;
  cursor: pointer; }
.cx .cx-row:hover { background: var(--cx-track); }
.cx .cx-row[aria-pressed="true"] { border-color: var(--cx-fill); background: var(--block-background-fill);
  box-shadow: inset 4px 0 0 var(--cx-fill); }
.cx .cx-row:focus-visible, .cx summary:focus-visible { outline: 3px solid var(--cx-fill); outline-offset: 1px; }
.cx .cx-line { display: flex; align-items: center; gap: 10px; }
.cx .cx-name { flex: 1; min-width: 0; overflow-wrap: anywhere; font-weight: 550; }
.cx .cx-positive { color: var(--cx-positive); border: 1px solid var(--cx-positive); border-radius: 99px;
  padding: 0 9px; font-size: 12.5px; font-weight: 650; }
.cx .cx-number { width: 44px; text-align: right; font-variant-numeric: tabular-nums; }
.cx .cx-bar { position: relative; display: block; height: 14px; border-radius: 4px; background: var(--cx-track);
  margin: 3px 0; overflow: hidden; flex: 1; }
.cx .cx-row:hover .cx-bar { background: var(--border-color-primary); }
.cx .cx-fill { position: absolute; inset: 3px auto 3px 0; border-radius: 0 3px 3px 0; background: var(--cx-fill); }
.cx .cx-band { position: absolute; top: 0; bottom: 0; background: var(--cx-band); min-width: 1px; }
.cx .cx-tick { position: absolute; top: 0; bottom: 0; width: 3px; margin-left: -1.5px; background: var(--cx-tick); }
.cx .cx-member { display: block; position: relative; font-size: 13px; color: var(--cx-soft); }
.cx .cx-member .cx-bar { height: 6px; margin: 2px 0; }
.cx .cx-member .cx-fill { inset: 0 auto 0 0; }
.cx .cx-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.cx .cx-a .cx-fill, .cx .cx-key.cx-a { background: var(--cx-a); }
.cx .cx-b .cx-fill, .cx .cx-key.cx-b { background: var(--cx-b); }
.cx .cx-small { display: block; color: var(--cx-soft); font-size: 13px; font-variant-numeric: tabular-nums; }
.cx .cx-small span { white-space: nowrap; }
.cx summary { cursor: pointer; padding: 8px 10px; }
.cx .cx-maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(240px, 100%), 1fr)); gap: 12px; }
.cx .cx-maps + .cx-soft { margin-top: 10px; }
.cx figure { margin: 0; min-width: 0; }
.cx figure img { display: block; width: 100%; height: auto; border-radius: 6px; background: #000; }
.cx figcaption { margin: 4px 0 0; font-size: 13.5px; }
@media (min-width: 900px) { .cx-left { position: sticky; top: 10px; align-self: flex-start; } }
"""

# One listener for all buttons, which stays when the list is drawn again. Where the columns are stacked, the maps are
# above the list: they are brought into sight. Who dropped an image by keyboard goes on at the first finding.
FINDINGS = """
element.addEventListener('click', (event) => {
  const row = event.target.closest('.cx-row');
  if (!row) return;
  element.querySelectorAll('.cx-row').forEach((each) => each.setAttribute('aria-pressed', String(each === row)));
  trigger('select', { place: Number(row.dataset.place) });
  if (window.innerWidth < 900) document.getElementById('cx-maps').scrollIntoView();
});
watch('value', () => {
  const first = element.querySelector('.cx-row');
  if (first && document.activeElement === document.body) first.focus({ preventScroll: true });
});
"""

# Gradio gives a group of radio buttons no name that is read aloud.
GROUPS = """
() => document.querySelectorAll('fieldset').forEach((group) => {
  const label = group.querySelector('[data-testid="block-info"]');
  if (label) group.setAttribute('aria-label', label.textContent.trim());
})
"""
