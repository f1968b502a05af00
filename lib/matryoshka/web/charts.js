// Pictures: specifications say what is drawn, the style sheet in which colours.
const views = new Map();

function colour(name) {
  const probe = document.body.appendChild(element("span", { hidden: "" }));
  probe.style.color = `var(--${name})`;
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

function chartConfig(width) {
  const [ink, quiet, grid, card, accent] = ["ink", "quiet", "grid", "card", "accent"].map(colour);
  const series = [1, 2, 3, 4, 5, 6, 7, 8, 9].map((number) => colour(`series-${number}`));
  const shapes = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left", "circle"];
  const font = getComputedStyle(document.body).fontFamily;
  return {
    background: null,
    aria: false, // the figure has a title, a caption and a table; a name for every mark would only be noise
    font,
    range: { category: series, symbol: shapes, ramp: [accent, quiet] },
    view: { stroke: null },
    axis: { labelColor: quiet, titleColor: quiet, gridColor: grid, domain: false, ticks: false, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal",
      labelPadding: 8, titlePadding: 10, tickCount: 5, labelLimit: width < 500 ? 120 : 220 },
    legend: { orient: "top", labelColor: ink, labelFontSize: 12.5, symbolSize: 90, symbolStrokeWidth: 2, columns: Math.max(2, Math.floor(width / 142)), columnPadding: 14, padding: 0, offset: 12, labelLimit: 108 },
    style: {
      trend: { strokeWidth: 2.5, color: accent, interpolate: "linear" },
      spot: { filled: true, opacity: 1, size: 80, color: accent, stroke: card, strokeWidth: 1 },
      star: { filled: true, stroke: card, strokeWidth: 0.4 },
      band: { opacity: 0.16 },
      bar: { color: accent },
      interval: { strokeWidth: 4, opacity: 0.55, color: accent, strokeCap: "round" },
      estimate: { filled: true, opacity: 1, size: 130, color: accent },
      reference: { color: quiet, strokeDash: [6, 4], strokeWidth: 1.5, opacity: 1 },
      note: { color: quiet, fontSize: 12, font },
      label: { color: ink, fontSize: 12, font },
    },
  };
}

async function draw(place) {
  const key = place.dataset.chart;
  const config = chartConfig(place.clientWidth);
  const chosen = place.closest("figure").querySelector("select[data-parameter]");
  const old = views.get(key);
  const { view } = await window.vegaEmbed(place, data.figures[key], {
    actions: false, ast: true, config, defaultStyle: false, mode: "vega-lite", renderer: "svg", tooltip: { disableDefaultStyle: true },
  });
  old?.finalize();
  views.set(key, view);
  if (chosen) await choose(view, chosen);
  if (key.startsWith("map-")) view.addEventListener("mouseover", (_, item) => focus(item?.datum?.place));
}

function choose(view, select) {
  return view.signal(select.dataset.parameter, select.value).runAsync();
}

// The document that is pointed at in one map stands out in the other.
function focus(place) {
  for (const [key, view] of views) {
    if (key.startsWith("map-")) view.signal("focus", place ?? -1).runAsync();
  }
}

async function drawAll() {
  for (const place of document.querySelectorAll("[data-chart]")) await draw(place);
  root.dataset.drawn = isDark() ? "dark" : "light";
}

let drawing = drawAll();
redraw.push(() => {
  drawing = drawing.then(drawAll);
});
for (const select of document.querySelectorAll("select[data-parameter]")) {
  const key = select.closest("figure").querySelector("[data-chart]").dataset.chart;
  select.addEventListener("change", () => choose(views.get(key), select));
}
