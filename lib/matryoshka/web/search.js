// The search page: a sample of queries, each with its results at every resolution, found beforehand.
function startSearch({ documents, queries }) {
  const [box, list, found, answer] = ["question", "suggestions", "found", "answer"].map((id) => document.getElementById(id));
  const texts = new Map(Object.entries(documents)); // an id may be the name of what every object has
  let matches = [];
  let active = -1;

  function suggest() {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    matches = queries.filter((query) => words.every((word) => query.text.toLowerCase().includes(word)));
    list.replaceChildren(...matches.map((query, place) => {
      const item = element("li", { role: "option", id: `suggestion-${place}`, "aria-selected": "false" }, element("bdi", {}, query.text));
      item.addEventListener("mousedown", (event) => event.preventDefault()); // the box keeps the focus
      item.addEventListener("click", () => pick(place));
      return item;
    }));
    found.textContent = `${matches.length} of ${queries.length} queries of the sample`;
    activate(-1);
    open(matches.length > 0);
  }

  function open(isOpen) {
    list.hidden = !isOpen;
    box.setAttribute("aria-expanded", String(isOpen));
    if (!isOpen) activate(-1);
  }

  function activate(place) {
    active = place;
    [...list.children].forEach((item, number) => item.setAttribute("aria-selected", String(number === place)));
    if (place < 0) return box.removeAttribute("aria-activedescendant");
    box.setAttribute("aria-activedescendant", `suggestion-${place}`);
    list.children[place].scrollIntoView({ block: "nearest" });
  }

  function pick(place) {
    box.value = matches[place].text;
    show(matches[place]);
    open(false);
  }

  const keys = {
    ArrowDown: () => (list.hidden ? suggest() : activate((active + 1) % matches.length)),
    ArrowUp: () => (list.hidden ? suggest() : activate((Math.max(active, 0) - 1 + matches.length) % matches.length)),
    Enter: () => matches.length && pick(Math.max(active, 0)),
    Escape: () => open(false),
  };
  box.addEventListener("keydown", (event) => {
    if (!(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });
  box.addEventListener("input", suggest);
  box.addEventListener("click", () => {
    if (!list.hidden) return;
    box.select();
    suggestAll();
  });
  box.addEventListener("blur", () => open(false));

  function suggestAll() {
    const own = box.value;
    box.value = "";
    suggest();
    box.value = own;
  }

  function show(query) {
    const dims = Object.keys(query.results).sort((one, other) => other - one);
    const relevant = new Map(Object.entries(query.relevant).filter(([, grade]) => grade > 0));
    const numRelevant = query.num_relevant ?? relevant.size; // those that are not shown have no grade here
    const ranks = new Map((query.results[dims[0]] ?? []).map(([id], place) => [id, place]));
    const parts = [element("h3", {}, element("bdi", {}, query.text)),
      element("p", { class: "quiet" }, numRelevant === 1 ? "1 relevant document." : `${numRelevant.toLocaleString("en")} relevant documents.`)];
    if (query.funnel?.length) parts.push(element("h4", {}, "Through the funnel"), funnel(query.funnel, numRelevant));
    const columns = element("div", { class: "columns", tabindex: "0", role: "region", "aria-label": "Results at every resolution" },
      ...dims.map((dim) => column(query.results[dim], dim, dims[0], ranks, relevant, numRelevant)));
    const legend = element("p", { class: "quiet" }, `Each with its score, and how far it moved against ${dims[0]} dims.`);
    answer.replaceChildren(...parts, element("h4", {}, "At every resolution"), legend, columns);
  }

  function funnel(steps, numRelevant) {
    return element("ol", { class: "funnel" }, ...steps.map(({ dim, kept, relevant_kept }, place) => {
      const dropped = place ? steps[place - 1].kept - kept : null;
      const lost = place ? steps[place - 1].relevant_kept - relevant_kept : numRelevant - relevant_kept;
      return element("li", {}, `${dim} dims`, element("strong", {}, `${kept.toLocaleString("en")} kept`),
        dropped === null ? "of the whole corpus" : `${dropped.toLocaleString("en")} dropped`,
        element("span", { class: lost ? "note" : "mark" }, `${lost ? "" : "✓ "}${relevant_kept} of ${numRelevant.toLocaleString("en")} relevant kept${lost ? `, ${lost.toLocaleString("en")} lost here` : ""}`));
    }));
  }

  function column(found, dim, widest, ranks, relevant, numRelevant) {
    const numFound = found.filter(([id]) => relevant.has(id)).length;
    const items = found.map(([id, score], place) => {
      const grade = relevant.get(id) ?? 0;
      const marks = grade > 0 ? [element("span", { class: "mark" }, grade > 1 ? `✓ relevant, grade ${grade}` : "✓ relevant")] : [];
      const item = element("li", { class: grade > 0 ? "result relevant" : "result", tabindex: "0" }, ...marks,
        element("bdi", { class: "text" }, texts.get(id) ?? id), element("span", { class: "note" }, note(score, place, dim === widest ? place : ranks.get(id))));
      item.dataset.document = id;
      return item;
    });
    return element("div", { class: "column" }, element("h5", {}, `${dim} dims`),
      element("p", { class: "quiet" }, `${numFound} of ${numRelevant.toLocaleString("en")} relevant found`), element("ol", { class: "results" }, ...items));
  }

  function note(score, place, was) {
    const moved = was === undefined ? "new" : was === place ? "" : was > place ? `up ${was - place}` : `down ${place - was}`;
    return [score.toFixed(3), moved].filter(Boolean).join(", ");
  }

  // The same document in all columns.
  function mark(event, isOn) {
    const id = event.target.closest?.("[data-document]")?.dataset.document;
    for (const item of answer.querySelectorAll("[data-document]")) item.classList.toggle("same", isOn && item.dataset.document === id);
  }
  for (const [name, isOn] of [["mouseover", true], ["focusin", true], ["mouseleave", false], ["focusout", false]]) {
    answer.addEventListener(name, (event) => mark(event, isOn));
  }

  found.textContent = `${queries.length} queries in the sample`;
  show(queries[0]);
}

if (data.searches?.queries?.length) startSearch(data.searches);
