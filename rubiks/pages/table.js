// Sorts and searches tables; templates/table.html says how they are written.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();

  const sort = (column, descending) => {
    const number = heads[column].dataset.type === "number";
    const compare = number ? (a, b) => a - b : new Intl.Collator(undefined, { numeric: true }).compare;
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [value(one, column), value(other, column)];
      if (a === "" || b === "") return (a === "") - (b === "");
      return descending ? compare(b, a) : compare(a, b);
    });
    body.append(...rows);
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      // Numbers from the highest first, text from A.
      sort(column, now ? now === "ascending" : head.dataset.type === "number");
    });
  });

  const search = document.querySelector(`[data-search="${CSS.escape(table.id)}"]`);
  if (!search) continue;
  const shown = document.querySelector(`[data-shown="${CSS.escape(table.id)}"]`);
  const update = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const row of body.rows) {
      const text = value(row, 0).toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      found += !row.hidden;
    }
    shown.textContent = words.length ? `${found} of ${body.rows.length}` : "";
  };
  search.addEventListener("input", update);
  update();
}
