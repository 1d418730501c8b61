// The table of results. Without this script it is a plain, complete table. No module, which a page
// opened as a file may not load.
{
  const table = document.querySelector(".results table");
  const rows = [...table.tBodies[0].rows]; // sorting moves them, and keeps them
  const filter = document.querySelector(".results-filter");
  const input = filter.querySelector("input");
  const status = filter.querySelector("[role=status]");

  // sortable.min.js listens for clicks in a heading; a button takes the keyboard too.
  for (const heading of table.tHead.rows[0].cells) {
    if (heading.classList.contains("no-sort")) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
  }

  // A row stays that holds every word.
  const show = () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
    const shown = rows.filter((row) => !row.hidden).length;
    status.textContent = `${shown} of ${rows.length} recipes`;
  };
  input.addEventListener("input", show);
  filter.hidden = false;
  show();
}
