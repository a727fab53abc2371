"use strict";
// The report works on the table that is in the page and on the JSON in #sweep; it fetches nothing.
(() => {
  const sweep = JSON.parse(document.getElementById("sweep").textContent);
  const table = document.getElementById("cells");
  const body = table.querySelector("tbody:not(.reference)");
  const rows = Array.from(body.rows); // rows[i] shows sweep.cells[i], wherever sorting puts it
  const filter = document.getElementById("filter");
  const frontierOnly = document.getElementById("frontier-only");
  const klLog = document.getElementById("kl-log");
  const wholeRange = document.getElementById("perplexity-whole"); // null where the axis is whole anyway
  const charts = { perplexity: document.getElementById("plot-perplexity"), kl: document.getElementById("plot-kl") };
  const MARGIN = { l: 52, r: 14, t: 14, b: 44 };
  const PAPER = { width: 680, height: 310 }; // pixels: the width of A4 and Letter upright, two charts a page
  let printing = false;

  const isShown = (index) => !rows[index].hidden;

  // ---- table -------------------------------------------------------------------------------------------------------

  function sortBy(header) {
    const ascending = header.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const numeric = header.dataset.kind === "number";
    const key = (row) => {
      const value = row.cells[header.cellIndex].dataset.value;
      return numeric ? Number(value) : value;
    };
    const compare = (a, b) => {
      if (!numeric) return (ascending ? 1 : -1) * a.localeCompare(b, "en", { numeric: true });
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b); // last, both ways
      return a === b ? 0 : a < b === ascending ? -1 : 1;
    };
    body.append(...Array.from(body.rows).sort((a, b) => compare(key(a), key(b))));
  }

  function applyFilter() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    sweep.cells.forEach((cell, index) => {
      const matches = words.every((word) => cell.words.includes(word));
      rows[index].hidden = !matches || (frontierOnly.checked && !rows[index].classList.contains("frontier"));
    });
    const shown = rows.filter((row) => !row.hidden).length;
    document.getElementById("shown").textContent = `${shown} of ${rows.length} schemes`;
    drawAll();
  }

  // ---- charts ------------------------------------------------------------------------------------------------------

  // Plotly reads a small HTML in its texts.
  const escape = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  // The axis over all cells, so that it keeps still while cells are filtered: {log, low, high} in the value's own unit.
  function axisOf(metric) {
    const log = metric === "kl" ? klLog.checked : wholeRange ? wholeRange.checked : sweep.perplexity_scale === "log";
    const ceiling = metric === "perplexity" && !log ? sweep.ceiling : null;
    const values = sweep.cells.map((cell) => cell[metric]);
    if (metric === "perplexity") values.push(sweep.reference.perplexity);
    else if (!log) values.push(0);
    const shown = values.filter((v) => Number.isFinite(v) && (ceiling === null || v <= ceiling) && (!log || v > 0));
    if (!shown.length) return { log, low: 0.1, high: 1 };
    const low = Math.min(...shown);
    const high = Math.max(...shown);
    if (log) {
      const room = high > 1.001 * low ? (high / low) ** 0.06 : 1.1;
      return { log, low: low / room ** 1.5, high: high * room };
    }
    const room = 0.06 * (high - low) || 0.01 * Math.abs(high) || 1;
    return { log, low: low - 1.5 * room, high: high + room };
  }

  // Where a cell stands; what the axis cannot show stands at its edge, what is no number at the upper one.
  function placeOf(value, axis) {
    if (value !== null && value < axis.low) return { y: axis.low, edge: "triangle-down-open" };
    if (value === null || !(value <= axis.high)) return { y: axis.high, edge: "triangle-up-open" };
    return { y: value, edge: null };
  }

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    if (printing) return { ink: "#1f2328", muted: "#59636e", rule: "#d8dde3", surface: "#ffffff", raised: "#f6f7f9" };
    return Object.fromEntries(["ink", "muted", "rule", "surface", "raised"].map((name) => [name, read(`--${name}`)]));
  }

  function draw(metric) {
    const node = charts[metric];
    const { width, height } = printing ? PAPER : { width: node.clientWidth, height: node.clientHeight };
    const axis = axisOf(metric);
    const colour = colours();
    const bits = sweep.cells.map((cell) => cell.bits);
    const margin = Math.max(0.08 * (Math.max(...bits) - Math.min(...bits)), 0.3);
    const xRange = [Math.min(...bits) - margin, Math.max(...bits) + margin];
    const front = sweep.frontier[metric];
    const shown = sweep.cells.map((_, index) => index).filter(isShown);
    const places = new Map(shown.map((index) => [index, placeOf(sweep.cells[index][metric], axis)]));
    const onFront = (index) => front.includes(index);

    const line = {
      x: front.map((index) => sweep.cells[index].bits),
      y: front.map((index) => sweep.cells[index][metric]),
      mode: "lines",
      line: { color: colour.muted, width: 1, shape: "hv" },
      hoverinfo: "skip",
      cliponaxis: true,
    };
    const points = {
      x: shown.map((index) => sweep.cells[index].bits),
      y: shown.map((index) => places.get(index).y),
      mode: "markers",
      marker: {
        size: 10,
        opacity: 1,
        color: shown.map((index) => sweep.cells[index].colour),
        symbol: shown.map((index) => places.get(index).edge || sweep.cells[index].symbol),
        line: {
          width: shown.map((index) => (onFront(index) || places.get(index).edge ? 1.8 : 0.5)),
          color: shown.map((index) =>
            places.get(index).edge ? sweep.cells[index].colour : onFront(index) ? colour.ink : colour.surface,
          ),
        },
      },
      text: shown.map((index) => {
        const [head, ...lines] = sweep.cells[index].tooltip.map(escape);
        return [`<b>${head}</b>`, ...lines].join("<br>");
      }),
      hoverinfo: "text",
      hoverlabel: { bgcolor: colour.raised, bordercolor: colour.muted, align: "left", font: { color: colour.ink, size: 13 } },
      cliponaxis: false,
    };
    const layout = {
      width,
      height,
      margin: MARGIN,
      uirevision: `${axis.log} ${printing}`, // a redraw keeps the reader's zoom
      paper_bgcolor: colour.surface,
      plot_bgcolor: colour.surface,
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif", size: 12, color: colour.ink },
      showlegend: false,
      hovermode: "closest",
      dragmode: "zoom",
      xaxis: { title: { text: "bits per weight, scales included", font: { size: 12 } }, range: xRange, ...lines(colour) },
      yaxis: {
        type: axis.log ? "log" : "linear",
        range: axis.log ? [Math.log10(axis.low), Math.log10(axis.high)] : [axis.low, axis.high],
        ...ticks(axis),
        ...lines(colour),
      },
      shapes: [],
      annotations: labels(metric, width, height, axis, xRange, places, colour),
    };
    if (metric === "perplexity" && sweep.reference.perplexity !== null) {
      const y = sweep.reference.perplexity;
      layout.shapes.push({
        type: "line", layer: "below", xref: "paper", x0: 0, x1: 1, y0: y, y1: y,
        line: { color: colour.ink, width: 1, dash: "dash" },
      });
      layout.annotations.push({
        text: escape(sweep.reference.label), xref: "paper", x: 0, xanchor: "left", yanchor: "top",
        y: axis.log ? Math.log10(y) : y, showarrow: false, font: { size: 11, color: colour.ink },
      });
    }
    const config = {
      displaylogo: false,
      showSendToCloud: false, // on by default in plotly.js 4: the page sends nothing anywhere
      plotlyServerURL: "",
      modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]],
      toImageButtonOptions: { filename: `sweep-${metric}`, scale: 2 },
    };
    return Plotly.react(node, [line, points], layout, config);
  }

  const lines = (colour) => ({ gridcolor: colour.rule, zeroline: false, linecolor: colour.rule, tickcolor: colour.rule });

  function ticks(axis) {
    if (!axis.log) return { tickformat: "~g", nticks: 8 };
    const wide = axis.high > 100 * axis.low;
    const values = [];
    for (let power = Math.floor(Math.log10(axis.low)); power <= Math.log10(axis.high); power += 1) {
      for (const digit of wide ? [1] : [1, 2, 5]) values.push(digit * 10 ** power);
    }
    return { tickmode: "array", tickvals: values, ticktext: values.map((value) => String(Number(value.toPrecision(1)))) };
  }

  // Names for the frontier's points and for those at an edge, where no point and no other name is in the way.
  function labels(metric, width, height, axis, xRange, places, colour) {
    const [plotWidth, plotHeight] = [width - MARGIN.l - MARGIN.r, height - MARGIN.t - MARGIN.b];
    const scale = axis.log ? Math.log10 : (value) => value;
    const pixels = new Map();
    for (const [index, place] of places) {
      pixels.set(index, {
        x: ((sweep.cells[index].bits - xRange[0]) / (xRange[1] - xRange[0])) * plotWidth,
        y: ((scale(axis.high) - scale(place.y)) / (scale(axis.high) - scale(axis.low))) * plotHeight,
      });
    }
    const taken = Array.from(pixels.values(), ({ x, y }) => ({ left: x - 6, right: x + 6, top: y - 6, bottom: y + 6 }));
    const overlaps = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
    const front = sweep.frontier[metric].filter((index) => places.has(index));
    const edges = Array.from(places.keys()).filter((index) => places.get(index).edge && !front.includes(index));
    const found = [];
    for (const index of [...front, ...edges]) {
      const cell = sweep.cells[index];
      const { y: value, edge } = places.get(index);
      const { x, y } = pixels.get(index);
      const text = edge ? `${cell.label} ${cell.short[metric]}` : cell.label;
      const [wide, high] = [6.2 * text.length + 4, 14];
      // Below and left of a frontier point lies no other point, by what a frontier is.
      const corners = [[x - 7 - wide, y + 2], [x - wide / 2, y + 8], [x + 7, y - 4 - high], [x - wide / 2, y - 8 - high]];
      if (edge) {
        const inward = y + (y < plotHeight / 2 ? 8 : -8 - high);
        corners.unshift([x - wide / 2, inward], [x + 7, inward], [Math.max(x - wide / 2, 2), inward]);
      }
      const box = corners
        .map(([left, top]) => ({ left, top, right: left + wide, bottom: top + high }))
        .find((box) => box.left > 0 && box.right < plotWidth && box.top > -MARGIN.t && box.bottom < plotHeight
          && !taken.some((other) => overlaps(box, other)));
      if (!box) continue;
      taken.push(box);
      found.push({
        text: escape(text), showarrow: false, font: { size: 11, color: edge ? colour.muted : colour.ink },
        x: cell.bits, y: scale(value), xanchor: "center", yanchor: "middle",
        xshift: (box.left + box.right) / 2 - x, yshift: y - (box.top + box.bottom) / 2,
      });
    }
    return found;
  }

  const drawAll = () => { for (const metric of Object.keys(charts)) draw(metric); };

  // ---- wiring ------------------------------------------------------------------------------------------------------

  for (const header of table.tHead.rows[0].cells) {
    header.querySelector("button").addEventListener("click", () => sortBy(header));
  }
  filter.addEventListener("input", applyFilter);
  frontierOnly.addEventListener("change", applyFilter);
  klLog.addEventListener("change", () => draw("kl"));
  if (wholeRange) wholeRange.addEventListener("change", () => draw("perplexity"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("resize", () => requestAnimationFrame(drawAll));
  const onPaper = (state) => () => { printing = state; drawAll(); };
  addEventListener("beforeprint", onPaper(true));
  addEventListener("afterprint", onPaper(false));
  applyFilter(); // a reloaded page keeps what was typed and ticked
})();
