"use strict";
// Click a column's head (or press Enter or Space on it) to sort by it; what was not measured stays last either way.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const body = table.tBodies[0];
      const key = (row) => {
        const cell = row.cells[column];
        return cell.tagName === "TH" ? cell.textContent.trim() : cell.dataset.sort;
      };
      const unknown = (value) => value === undefined || value === "NaN" || value === "nan";
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (unknown(x) || unknown(y)) return unknown(x) - unknown(y);
        const numeric = x !== "" && y !== "" && !Number.isNaN(+x) && !Number.isNaN(+y);
        const least = numeric ? x - y : x.localeCompare(y, "en", { numeric: true });
        return descending ? -least : least;
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
