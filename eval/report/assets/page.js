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

// Maps of tokens: the page is whole without what follows, which adds single layers and
// heads: which to show, and the heads of the token that is pointed at.
const tip = document.getElementById("tip");
function unpack(script) {
  const map = JSON.parse(script.textContent);
  const raw = atob(map.bits);
  const first = [0];
  for (const count of map.heads) first.push(first.at(-1) + count);
  map.rows = first.at(-1);
  map.row = (layer, head) => first[layer] + head;
  map.layer = (row) => first.findLastIndex((start) => start <= row);
  map.first = (layer) => first[layer];
  map.held = (row, at) => (raw.charCodeAt(row * map.width + (at >> 3)) >> (at & 7)) & 1;
  return map;
}
function shareOf(map, rows, at) {
  return rows.filter((row) => map.held(row, at)).length / rows.length;
}
function level(share) {
  if (share <= 0 || share >= 1) return share >= 1 ? 8 : 0;
  return Math.min(Math.max(Math.round(share * 8), 1), 7);
}
function shades(maps, rows, at) {
  const levels = maps.map((map) => level(shareOf(map, rows, at)));
  if (maps.length === 2) {
    const [a, b] = levels;
    return `a${a} b${b}${a + b ? "" : " none"}`;
  }
  return `s${levels[0]}${{ 0: " none", 8: " all" }[levels[0]] || ""}`;
}
function heads(maps, at) {
  const map = maps[0];
  const lines = [];
  const most = Math.max(...map.heads);
  for (let head = 0; head < most; head += 1) {
    const marks = map.heads.map((count, layer) => {
      if (head >= count) return " ";
      const kept = maps.map((one) => one.held(one.row(layer, head), at));
      return maps.length === 1 ? "·■"[kept[0]] : "·▀▄█"[kept[0] + 2 * kept[1]];
    });
    lines.push(`${String(head).padStart(3)} ${marks.join("")}`);
  }
  const legend = maps.length === 1 ? "■ kept" : "▀ above alone, ▄ below alone, █ both";
  return `head, layers 0 to ${map.heads.length - 1} (${legend}):\n${lines.join("\n")}`;
}
function show(place, said, detail) {
  const block = document.createElement("pre");
  block.textContent = detail;
  tip.replaceChildren(said, block);
  tip.hidden = false;
  const left = Math.min(place.left, innerWidth - tip.offsetWidth - 8);
  const below = place.bottom + 6;
  const fits = below + tip.offsetHeight < innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${fits ? below : Math.max(8, place.top - tip.offsetHeight - 6)}px`;
}
function option(select, text, value) {
  select.append(new Option(text, value));
}
for (const block of document.querySelectorAll(".tokens")) {
  const scripts = [...block.querySelectorAll("script.bits")];
  if (!scripts.length) continue;
  const maps = scripts.map(unpack);
  const map = maps[0];
  const boxes = [...block.querySelector(".flow").querySelectorAll("i")];
  const whole = boxes.map((box) => box.className);
  const later = whole.map((name) => (name.includes("later") ? " later" : ""));
  const said = boxes.map((box) => box.title);
  const [layers, headList] = block.querySelectorAll(".choose select");
  const chosen = () => {
    const all = [...Array(map.rows).keys()];
    const layer = layers.value;
    const head = headList.value;
    return all.filter((row) => (layer === "" || map.layer(row) === Number(layer))
      && (head === "" || row - map.first(map.layer(row)) === Number(head)));
  };
  const paint = () => {
    const rows = chosen();
    const every = layers.value === "" && headList.value === "";
    boxes.forEach((box, i) => {
      box.className = every ? whole[i] : shades(maps, rows, map.starts[i]) + later[i];
    });
  };
  option(layers, "all", "");
  map.heads.forEach((_, layer) => option(layers, layer, layer));
  option(headList, "all", "");
  for (let head = 0; head < Math.max(...map.heads); head += 1) {
    option(headList, head, head);
  }
  layers.addEventListener("change", paint);
  headList.addEventListener("change", paint);
  block.querySelector(".choose").classList.add("ready");
  boxes.forEach((box, i) => { box.dataset.at = i; });
  block.addEventListener("pointerover", (event) => {
    const i = event.target.dataset.at;
    if (i === undefined) return;
    event.target.removeAttribute("title");
    show(event.target.getBoundingClientRect(), said[i], heads(maps, map.starts[i]));
  });
  block.addEventListener("pointerleave", () => { tip.hidden = true; });
  const fold = block.querySelector(".heads");
  if (fold) drawHeads(fold, map, said, (row) => {
    layers.value = map.layer(row);
    headList.value = row - map.first(map.layer(row));
    paint();
  });
}
function drawHeads(fold, map, said, choose) {
  const canvas = fold.querySelector("canvas");
  fold.classList.add("ready");
  fold.addEventListener("toggle", () => {
    if (!fold.open || canvas.dataset.drawn) return;
    canvas.dataset.drawn = "1";
    canvas.width = map.starts.length;
    canvas.height = map.rows;
    canvas.style.height = `${Math.min(Math.max(map.rows * 3, 60), 720)}px`;
    const ink = getComputedStyle(canvas).getPropertyValue("--cell");
    const pen = canvas.getContext("2d");
    for (let row = 0; row < map.rows; row += 1) {
      pen.fillStyle = `rgba(${ink}, ${map.layer(row) % 2 ? 0.62 : 1})`;
      map.starts.forEach((at, i) => {
        if (map.held(row, at)) pen.fillRect(i, row, 1, 1);
      });
    }
  });
  const where = (event) => {
    const box = canvas.getBoundingClientRect();
    const part = (value, low, size, count) =>
      Math.min(count - 1, Math.max(0, Math.floor((value - low) / size * count)));
    return [part(event.clientX, box.left, box.width, map.starts.length),
      part(event.clientY, box.top, box.height, map.rows)];
  };
  canvas.addEventListener("pointermove", (event) => {
    const [i, row] = where(event);
    const layer = map.layer(row);
    const kept = map.held(row, map.starts[i]) ? "kept it" : "dropped it";
    const place = { left: event.clientX, top: event.clientY, bottom: event.clientY };
    show(place, `layer ${layer}, head ${row - map.first(layer)} ${kept}`, said[i]);
  });
  canvas.addEventListener("click", (event) => choose(where(event)[1]));
}
// Two texts side by side: the same token is marked in both.
for (const sides of document.querySelectorAll(".sides")) {
  const flows = [...sides.querySelectorAll(".flow")]
    .map((one) => [...one.querySelectorAll("i")]);
  const mark = (event, on) => {
    const own = flows.find((boxes) => boxes.includes(event.target));
    if (!own) return;
    const i = own.indexOf(event.target);
    flows.forEach((boxes) => boxes[i].classList.toggle("here", on));
  };
  sides.addEventListener("pointerover", (event) => mark(event, true));
  sides.addEventListener("pointerout", (event) => mark(event, false));
}
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
