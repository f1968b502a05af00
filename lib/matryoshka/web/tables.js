// Tables: sorted by a click on a heading, taken away as CSV.
function csvCell(value, isNumber) {
  let text = String(value ?? "");
  // A spreadsheet would run text of a document that begins like a formula.
  if (!isNumber && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function download(name, header, rows) {
  const lines = [header, ...rows].map((row) => row.map((value) => csvCell(value, typeof value === "number")).join(","));
  const url = URL.createObjectURL(new Blob(["\uFEFF", lines.join("\r\n"), "\r\n"], { type: "text/csv" }));
  element("a", { href: url, download: `${name}.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function valueOf(cell) {
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  return cell.classList.contains("none") ? null : cell.textContent;
}

function compare(one, other, sign) {
  if (one === null || other === null) return (one === null) - (other === null); // what is missing stands last either way
  return sign * (typeof one === "number" && typeof other === "number" ? one - other : String(one).localeCompare(String(other), "en", { numeric: true }));
}

function makeSortable(heads, sort) {
  heads.forEach((head, column) => {
    const button = element("button", { type: "button" }, ...head.childNodes);
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const wasDown = head.getAttribute("aria-sort") === "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", wasDown ? "ascending" : "descending");
      sort(column, wasDown ? 1 : -1);
    });
  });
}

for (const place of document.querySelectorAll("[data-table]")) {
  const body = place.querySelector("tbody");
  const heads = [...place.querySelectorAll("th")];
  makeSortable(heads, (column, sign) => {
    const rows = [...body.rows].map((row) => [valueOf(row.cells[column]), row]);
    body.append(...rows.sort((one, other) => compare(one[0], other[0], sign)).map(([, row]) => row));
  });
  const button = element("button", { type: "button", "aria-label": `Download ${place.querySelector("caption").textContent} as CSV` }, "Download CSV");
  button.addEventListener("click", () => {
    const rows = [...body.rows].map((row) => [...row.cells].map(valueOf));
    download(place.dataset.table, heads.map((head) => head.textContent), rows);
  });
  place.append(element("div", { class: "tools" }, button));
}
