"use strict";
// A click on a column's name sorts the table by it, another one the other way round. What has no number stays last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.parentElement;
    const place = header.cellIndex;
    const table = header.closest("table");
    const body = table.tBodies[0];
    const up = header.getAttribute("aria-sort") !== "ascending";
    const numbers = header.classList.contains("number");
    const key = (row) => {
      const cell = row.cells[place];
      if (!numbers) return cell.textContent;
      return cell.dataset.value === undefined ? NaN : Number(cell.dataset.value);
    };
    const compare = (one, other) => {
      const a = key(one), b = key(other);
      if (!numbers) return (up ? 1 : -1) * a.localeCompare(b, "en", { numeric: true });
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return up ? a - b : b - a;
    };
    for (const other of table.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...[...body.rows].sort(compare));
  });
}
// on paper everything is open
const closed = () => document.querySelectorAll("details:not([open])");
let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...closed()];
  for (const each of opened) each.open = true;
});
window.addEventListener("afterprint", () => {
  for (const each of opened) each.open = false;
});
