// Brings a page to life: charts, tables, copying, the theme. All text of others is set as text.
const say = (text) => { document.getElementById("status").textContent = text; };

// Theme: the system's, until the reader chooses.
const root = document.documentElement;
const theme = document.getElementById("theme");
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
const showTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
theme.hidden = false;
theme.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
prefersDark.addEventListener("change", showTheme);
showTheme();

// Charts.
const specifications = JSON.parse(document.getElementById("charts").textContent);
const named = (parent, name, text) => {
  const element = parent.appendChild(document.createElement(name));
  element.textContent = text;
  return element;
};
for (const place of document.querySelectorAll(".chart")) {
  const specification = specifications[Number(place.dataset.number)];
  const options = { mode: "vega-lite", renderer: "svg", ast: true, actions: false };
  window.vegaEmbed(place, specification, options).then(({ view }) => {
    const caption = place.closest("figure").querySelector("figcaption").textContent;
    const saving = document.createElement("div");
    saving.className = "saving";
    for (const format of ["svg", "png"]) {
      const button = named(saving, "button", `Save as ${format.toUpperCase()}`);
      button.type = "button";
      button.setAttribute("aria-label", `${button.textContent}: ${caption}`);
      button.addEventListener("click", async () => {
        const link = document.createElement("a");
        link.href = await view.toImageURL(format, 2);
        link.download = `chart.${format}`;
        link.click();
      });
    }
    place.closest("figure").append(saving);
  }).catch((error) => {
    console.error(error);
    named(place, "p", `This chart could not be drawn: ${error.message}`);
  });
}

// Tables.
for (const table of document.querySelectorAll("table.data")) {
  const caption = table.caption.textContent;
  const isLong = table.tBodies[0].rows.length > 25;
  // The region that scrolls is the one that DataTables makes around the table alone.
  const region = table.parentElement;
  for (const name of ["role", "aria-label", "tabindex"]) region.removeAttribute(name);
  region.classList.remove("scroll");
  const api = window.jQuery(table).DataTable({
    order: [],
    autoWidth: false,
    paging: isLong,
    pageLength: 25,
    info: true,
    columnDefs: [{ targets: "number", type: "num", orderSequence: ["desc", "asc", ""] }],
    layout: {
      topStart: "search",
      topEnd: null,
      bottomStart: "info",
      bottomEnd: isLong ? "paging" : null,
    },
    language: {
      search: "Filter",
      searchPlaceholder: "words",
      info: "_START_ to _END_ of _TOTAL_ rows",
      infoEmpty: "no row",
      infoFiltered: "(filtered from _MAX_)",
      zeroRecords: "No row has all these words.",
    },
  });
  const around = api.table().container();
  const scrolled = around.querySelector(".dt-layout-table");
  scrolled.setAttribute("role", "region");
  scrolled.setAttribute("aria-label", caption);
  scrolled.tabIndex = 0;
  // DataTables sorts by Enter alone, and a button also answers to the space bar.
  around.addEventListener("keydown", (event) => {
    if (event.key !== " " || !event.target.matches(".dt-column-order")) return;
    event.preventDefault();
    event.target.click();
  });
  const search = around.querySelector(".dt-search");
  search.querySelector("input").setAttribute("aria-label", `Filter: ${caption}`);
  api.columns().every(function () {
    const head = this.header();
    if (!("choices" in head.dataset)) return;
    const name = this.title();
    const label = named(search, "label", `${head.querySelector(".dt-column-title").textContent} `);
    const list = label.appendChild(document.createElement("select"));
    named(list, "option", "all").value = "";
    const texts = new Set(this.nodes().toArray().map((cell) => cell.textContent));
    for (const text of texts) named(list, "option", text).value = text;
    list.setAttribute("aria-label", `${name}: ${caption}`);
    list.addEventListener("change", () => {
      const wanted = list.value;
      this.search.fixed("choice", wanted === "" ? null : (_, __, row) =>
        this.cell(row, this.index()).node().textContent === wanted);
      this.draw();
    });
  });
  if (isLong) {
    window.addEventListener("beforeprint", () => api.page.len(-1).draw());
    window.addEventListener("afterprint", () => api.page.len(25).draw());
  }
}

// Folded parts are printed unfolded.
window.addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details:not([open])")) {
    folded.open = true;
    window.addEventListener("afterprint", () => { folded.open = false; }, { once: true });
  }
});

// Copying.
for (const button of document.querySelectorAll("[data-copies]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const code = document.getElementById(button.dataset.copies);
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      // Pages from files have no clipboard in some browsers; the selection can be copied.
      window.getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    say("Copied.");
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
}
document.documentElement.dataset.ready = "";
