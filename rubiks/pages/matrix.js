// The confusion matrix on a canvas: whole or zoomed, in the order of labels or with confused classes together.
{
  const data = JSON.parse(document.getElementById("matrix-data").textContent);
  const size = data.classes.length;
  const canvas = document.getElementById("matrix-canvas");
  const readout = document.getElementById("matrix-cell");
  const context = canvas.getContext("2d");
  const counts = new Map(data.cells.map(([label, predicted, videos]) => [label * size + predicted, videos]));
  const support = new Array(size).fill(0);
  for (const [label, , videos] of data.cells) support[label] += videos;

  let order, place; // class at each place, place of each class
  let zoom = 1; // 1 shows the whole matrix
  let left = 0, top = 0; // the first column and row that are seen, in classes
  let chosen = null; // {row, column} in places
  let width, height, gutter, side; // of the canvas, the room for names, and the matrix, in CSS pixels

  const cell = () => (side * zoom) / size;
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const shownColumns = () => (width - gutter) / cell();
  const shownRows = () => (height - gutter) / cell();

  function arrange(byConfusion) {
    const before = chosen && { label: order[chosen.row], predicted: order[chosen.column] };
    order = byConfusion ? data.order : data.classes.map((_, number) => number);
    place = [];
    order.forEach((label, number) => (place[label] = number));
    if (before) chosen = { row: place[before.label], column: place[before.predicted] };
    draw();
  }

  function resize() {
    const box = canvas.getBoundingClientRect();
    const density = window.devicePixelRatio || 1;
    [width, height] = [box.width, box.height];
    canvas.width = Math.round(width * density);
    canvas.height = Math.round(height * density);
    context.setTransform(density, 0, 0, density, 0, 0);
    gutter = clamp(width * 0.26, 92, 220);
    side = Math.min(width, height) - gutter;
    draw();
  }

  function draw() {
    if (!width) return; // not laid out yet
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    left = clamp(left, 0, Math.max(0, size - shownColumns()));
    top = clamp(top, 0, Math.max(0, size - shownRows()));
    const step = cell();
    context.clearRect(0, 0, width, height);
    context.save();
    context.beginPath();
    context.rect(gutter, gutter, width - gutter, height - gutter);
    context.clip();
    context.fillStyle = colour("track");
    context.fillRect(x(0), y(0), step * size, step * size);
    const [hit, miss] = [colour("hit"), colour("miss")];
    const large = Math.max(step - (step > 8 ? 1 : 0), 1); // rare mistakes are seen at any size
    for (const [label, predicted, videos] of data.cells) {
      context.globalAlpha = 0.12 + 0.88 * Math.sqrt(videos / support[label]);
      context.fillStyle = label === predicted ? hit : miss;
      context.fillRect(x(place[predicted]), y(place[label]), large, large);
    }
    context.globalAlpha = 1;
    if (step >= 26) drawShares(colour("text"), colour("card"), step);
    if (chosen) {
      context.strokeStyle = colour("text");
      context.lineWidth = 1.5;
      context.strokeRect(x(chosen.column) - 0.5, y(chosen.row) - 0.5, Math.max(step, 3) + 1, Math.max(step, 3) + 1);
    }
    context.restore();
    drawNames(colour("text"), colour("quiet"), step);
    canvas.classList.toggle("zoomed", zoom > 1);
  }

  const x = (column) => gutter + (column - left) * cell();
  const y = (row) => gutter + (row - top) * cell();

  function drawShares(ink, paper, step) {
    context.font = `${clamp(step / 3, 9, 13)}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (const [label, predicted, videos] of data.cells) {
      const share = Math.round((100 * videos) / support[label]);
      context.fillStyle = share > 40 ? paper : ink;
      context.fillText(share, x(place[predicted]) + step / 2, y(place[label]) + step / 2);
    }
  }

  // Names of rows at the left and of columns above: all of them if there is room, else those of the chosen cell.
  function drawNames(ink, quiet, step) {
    const all = step >= 11;
    const font = clamp(step * 0.8, 10, 13);
    const first = (start) => Math.max(0, Math.floor(start));
    for (const [vertical, start, shown, own] of [
      [false, top, shownRows(), chosen?.row],
      [true, left, shownColumns(), chosen?.column],
    ]) {
      const numbers = all
        ? Array.from({ length: size }, (_, number) => number).slice(first(start), Math.ceil(start + shown))
        : own === undefined ? [] : [own];
      for (const number of numbers) {
        const middle = gutter + (number + 0.5 - start) * step;
        if (middle < gutter || middle > (vertical ? width : height)) continue;
        context.save();
        const points = all ? font : 12;
        context.font = `${number === own ? "600 " : ""}${points}px system-ui, sans-serif`;
        context.fillStyle = number === own ? ink : quiet;
        context.textBaseline = "middle";
        context.textAlign = vertical ? "left" : "right";
        context.translate(...(vertical ? [middle, gutter - 6] : [gutter - 6, middle]));
        if (vertical) context.rotate(-Math.PI / 2);
        const most = Math.max(1, Math.floor(step / (points + 2)));
        const lines = wrapped(data.classes[order[number]], gutter - 10, most);
        lines.forEach((line, place) => {
          context.fillText(line, 0, (place - (lines.length - 1) / 2) * (points + 2));
        });
        context.restore();
      }
    }
    context.font = "12px system-ui, sans-serif";
    context.fillStyle = quiet;
    context.textAlign = "right";
    context.textBaseline = "alphabetic";
    context.fillText("predicted →", gutter - 6, gutter - 20);
    context.fillText("class ↓", gutter - 6, gutter - 6);
  }

  // A name in lines that fit, at most so many.
  function wrapped(text, room, most) {
    const lines = [];
    let rest = text.split(" ");
    while (rest.length && lines.length < most - 1) {
      let count = 1;
      while (count < rest.length && context.measureText(rest.slice(0, count + 1).join(" ")).width <= room) count++;
      lines.push(fitted(rest.slice(0, count).join(" "), room));
      rest = rest.slice(count);
    }
    return rest.length ? [...lines, fitted(rest.join(" "), room)] : lines;
  }

  // A name with its middle left out if it is too long: names often begin alike.
  function fitted(text, room) {
    const letters = [...text];
    const kept = (count) => {
      const end = Math.floor(count / 2);
      return `${letters.slice(0, count - end).join("").trimEnd()}…${letters.slice(letters.length - end).join("").trimStart()}`;
    };
    const fits = (shown) => context.measureText(shown).width <= room;
    if (fits(text)) return text;
    let [low, high] = [1, letters.length];
    while (low < high) {
      const middle = Math.ceil((low + high) / 2);
      if (fits(kept(middle))) low = middle;
      else high = middle - 1;
    }
    return kept(low);
  }

  function at(event) {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  function choose(row, column) {
    const inside = row >= 0 && row < size && column >= 0 && column < size;
    chosen = inside ? { row, column } : null;
    readout.textContent = "\u00a0";
    if (inside) {
      const [label, predicted] = [order[row], order[column]];
      const videos = counts.get(label * size + predicted) ?? 0;
      const share = support[label] ? ` (${((100 * videos) / support[label]).toFixed(1)}%)` : "";
      const outcome = label === predicted ? " recognised" : " taken for ";
      const other = document.createElement("bdi");
      other.textContent = data.classes[predicted];
      const name = document.createElement("b");
      name.textContent = data.classes[label];
      readout.replaceChildren(name, `: ${videos} of ${support[label]}${share}${outcome}`);
      if (label !== predicted) readout.append(other);
    }
    draw();
  }

  const chooseAt = ([right, down]) =>
    choose(right < gutter || down < gutter ? -1 : Math.floor(top + (down - gutter) / cell()),
      Math.floor(left + (right - gutter) / cell()));

  // Zoom so that what lies at this point stays there.
  function zoomAt(factor, right, down) {
    const [column, row] = [left + (right - gutter) / cell(), top + (down - gutter) / cell()];
    zoom = clamp(zoom * factor, 1, Math.max(1, (60 * size) / side));
    left = column - (right - gutter) / cell();
    top = row - (down - gutter) / cell();
    draw();
  }

  const centre = () => {
    if (!chosen) return [gutter + side / 2, gutter + side / 2];
    return [clamp(x(chosen.column + 0.5), gutter, width), clamp(y(chosen.row + 0.5), gutter, height)];
  };

  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && document.activeElement !== canvas) return; // the page scrolls
    event.preventDefault();
    zoomAt(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), ...at(event));
  }, { passive: false });

  const fingers = new Map();
  canvas.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, at(event));
    canvas.setPointerCapture(event.pointerId);
    if (fingers.size === 1) chooseAt(at(event));
  });
  canvas.addEventListener("pointermove", (event) => {
    const now = at(event);
    const before = fingers.get(event.pointerId);
    if (!before) {
      chooseAt(now);
      return;
    }
    const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    if (other) {
      const distance = ([a, b]) => Math.hypot(a - other[0], b - other[1]);
      zoomAt(distance(now) / Math.max(1, distance(before)), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    } else {
      left -= (now[0] - before[0]) / cell();
      top -= (now[1] - before[1]) / cell();
      draw();
    }
    fingers.set(event.pointerId, now);
  });
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => fingers.delete(event.pointerId));
  }

  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    const move = moves[event.key];
    if (move) {
      const from = chosen ?? { row: Math.floor(top) - move[0], column: Math.floor(left) - move[1] };
      const [row, column] = [clamp(from.row + move[0], 0, size - 1), clamp(from.column + move[1], 0, size - 1)];
      left = clamp(left, column + 1 - shownColumns(), column);
      top = clamp(top, row + 1 - shownRows(), row);
      choose(row, column);
    } else if (event.key === "+" || event.key === "-") zoomAt(event.key === "+" ? 1.6 : 0.625, ...centre());
    else return;
    event.preventDefault();
  });

  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => zoomAt(Number(button.dataset.zoom), ...centre()));
  }
  const select = document.getElementById("matrix-order");
  select.addEventListener("change", () => arrange(select.value === "confusion"));
  for (const media of ["(prefers-color-scheme: dark)", "print"]) matchMedia(media).addEventListener("change", draw);
  arrange(select.value === "confusion");
  new ResizeObserver(resize).observe(canvas);
}
