// Searches the classes: the list and the sections show those whose names have all the words.
const search = document.getElementById("search");
const entries = [...document.querySelectorAll("aside li[data-class]")];

const update = () => {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let found = 0;
  for (const entry of entries) {
    const name = entry.querySelector("bdi").textContent.toLowerCase();
    const hidden = !words.every((word) => name.includes(word));
    entry.hidden = hidden;
    document.getElementById(`class-${entry.dataset.class}`).hidden = hidden;
    found += !hidden;
  }
  document.getElementById("found").textContent = words.length ? `${found} of ${entries.length}` : "";
};
search.addEventListener("input", update);
update();
