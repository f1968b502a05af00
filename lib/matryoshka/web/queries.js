// Every query with its figures: too many for the page at once, so a part at a time.
const PAGE_ROWS = 25;

function showQueries(place, { metric, ids, texts, values }) {
  const systems = Object.keys(values);
  const dims = [...new Set(systems.flatMap((system) => Object.keys(values[system])))].filter((dim) => Number(dim) > 0);
  dims.sort((one, other) => other - one);
  const [before, after] = data.pair;
  const hasChange = before in values && after in values;
  const header = ["query", ...systems, ...(hasChange ? ["change"] : []), "id"];
  const state = { dim: dims[0], words: "", page: 0, column: hasChange ? systems.length + 1 : 0, sign: -1, rows: [] };

  const filter = element("input", { type: "search", placeholder: "Filter by words", "aria-label": "Filter queries by words" });
  const choice = element("select", { "aria-label": "Dims" }, ...dims.map((dim) => element("option", { value: dim }, `${dim} dims`)));
  const save = element("button", { type: "button" }, "Download CSV");
  const [back, forth] = ["Previous", "Next"].map((word) => element("button", { type: "button" }, word));
  const where = element("span", { role: "status" });
  const heads = header.map((name, column) => element("th", { scope: "col", class: column && name !== "id" ? "number" : "" }, name));
  const body = element("tbody");
  const caption = element("caption", { class: "unseen" }, `${metric} of every query`);
  const scroller = element("div", { class: "scroller", tabindex: "0", role: "region", "aria-label": "Table: every query" },
    element("table", {}, caption, element("thead", {}, element("tr", {}, ...heads)), body));
  place.append(element("p", { class: "quiet" }, `${metric} of ${ids.length.toLocaleString("en")} queries.`),
    element("div", { class: "tools" }, filter, choice), element("div", { class: "table" }, scroller), element("div", { class: "tools" }, save, back, forth, where));

  // A system without dims has its figures under another name.
  const figures = (system) => values[system][state.dim] ?? (Object.keys(values[system]).every((dim) => !dims.includes(dim)) ? Object.values(values[system])[0] : undefined);

  function rowsOf() {
    const columns = systems.map(figures);
    const [old, fresh] = [before, after].map((name) => columns[systems.indexOf(name)]);
    return ids.map((id, place) => {
      const change = hasChange ? [old && fresh ? Number((fresh[place] - old[place]).toFixed(4)) : null] : [];
      return [texts[place], ...columns.map((own) => own?.[place] ?? null), ...change, id];
    });
  }

  function select() {
    const words = state.words.toLowerCase().split(/\s+/).filter(Boolean);
    const isWanted = ([text, ...rest]) => words.every((word) => `${text} ${rest.at(-1)}`.toLowerCase().includes(word));
    state.rows = rowsOf().filter(isWanted).sort((one, other) => compare(one[state.column], other[state.column], state.sign));
    state.page = 0;
    show();
  }

  function show() {
    const start = state.page * PAGE_ROWS;
    const shown = state.rows.slice(start, start + PAGE_ROWS);
    body.replaceChildren(...shown.map((row) => element("tr", {}, ...row.map((value, column) => cellOf(value, header[column])))));
    where.textContent = shown.length
      ? `${(start + 1).toLocaleString("en")} to ${(start + shown.length).toLocaleString("en")} of ${state.rows.length.toLocaleString("en")}`
      : "No query has these words.";
    back.disabled = state.page === 0;
    forth.disabled = start + PAGE_ROWS >= state.rows.length;
  }

  function cellOf(value, name) {
    if (value === null) return element("td", { class: "none" }, "–");
    if (typeof value !== "number") return element("td", {}, element("bdi", {}, value));
    return element("td", { class: "number" }, `${name === "change" && value > 0 ? "+" : ""}${value.toFixed(3)}`);
  }

  makeSortable(heads, (column, sign) => {
    Object.assign(state, { column, sign });
    select();
  });
  filter.addEventListener("input", () => {
    state.words = filter.value;
    select();
  });
  choice.addEventListener("change", () => {
    state.dim = choice.value;
    select();
  });
  back.addEventListener("click", () => {
    state.page -= 1;
    show();
  });
  forth.addEventListener("click", () => {
    state.page += 1;
    show();
  });
  save.addEventListener("click", () => download(`queries-${state.dim}`, header, state.rows));
  select();
}

const everyQuery = document.getElementById("every-query");
if (everyQuery) showQueries(everyQuery, data.per_query);
