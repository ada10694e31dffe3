"use strict";
// Tables: a click on a heading sorts by that column, again the other way round.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // gaps stay last
      const [m, n] = [Number(x), Number(y)];
      const order = Number.isNaN(m - n) ? x.localeCompare(y) : m - n;
      return up ? order : -order;
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(compare));
  }));
}

// Token maps: one box per piece, one band per layer, its strength the heads that kept it.
const tip = document.getElementById("tip");
function detail(map, at) {
  const lines = [`position ${at}: ${JSON.stringify(map.pieces[at])}`];
  map.kept.forEach((heads, layer) => {
    const held = heads.flatMap((set, head) => (set.has(at) ? [head] : []));
    const which = held.length === 0 ? "dropped by all heads"
      : held.length === heads.length ? `kept by all ${heads.length} heads`
      : `kept by ${held.length} of ${heads.length}: head ${held.join(", ")}`;
    lines.push(`layer ${layer}: ${which}`);
  });
  return lines.join("\n");
}
function show(box, map) {
  tip.textContent = detail(map, Number(box.dataset.at));
  tip.hidden = false;
  const place = box.getBoundingClientRect();
  const left = Math.min(place.left, innerWidth - tip.offsetWidth - 8);
  const below = place.bottom + 6;
  const fits = below + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${fits ? below : place.top - tip.offsetHeight - 6}px`;
}
for (const data of document.querySelectorAll("script.tokens")) {
  const map = JSON.parse(data.textContent);
  map.kept = map.kept.map((layer) => layer.map((positions) => new Set(positions)));
  const view = data.previousElementSibling;
  view.style.setProperty("--bands", map.kept.length);
  map.pieces.forEach((piece, at) => {
    const box = document.createElement("i");
    box.textContent = piece.replaceAll("\n", "↵") || " ";
    box.dataset.at = at;
    if (at >= map.question) box.className = "question";
    const bands = map.kept.map((heads) => {
      const part = heads.filter((set) => set.has(at)).length / heads.length;
      const ink = `rgba(var(--cell), ${0.07 + 0.93 * part})`;
      return `linear-gradient(${ink}, ${ink})`;
    });
    box.style.backgroundImage = bands.join(",");
    box.style.backgroundSize = bands.map(() => "calc(100% - 1px) 4px").join(",");
    box.style.backgroundPosition = bands
      .map((_, layer) => `0 calc(100% - ${5 * (bands.length - 1 - layer)}px)`).join(",");
    view.append(box, "\u200b");
  });
  view.addEventListener("pointerover", (event) => {
    if (event.target.dataset.at) show(event.target, map);
  });
  view.addEventListener("pointerleave", () => { tip.hidden = true; });
}
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
