"use strict";
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const text = document.getElementById("text");
  const detail = document.getElementById("detail");
  const choices = document.getElementById("switch");
  const pieces = Array.from(text.children);
  const places = new Map(pieces.map((piece, index) => [piece, index]));
  const marks = ["not kept", "kept in part", "kept"];
  let view = Object.keys(data.views)[0];
  let current = -1;

  function describe(index) {
    const [start, end] = [data.start[index], data.end[index]];
    const where = end - start > 1 ? `tokens ${start} to ${end - 1}` : `token ${start}`;
    const { title, pattern, details, kept } = data.views[view];
    const shown = pieces[index].textContent.trimEnd() || "space";
    return `“${shown}” · ${where} · ${data.classes[data.class[index]]} · ${title}: ${marks[kept[index]]}, ${pattern.replace("{}", details[index])}`;
  }

  function select(index, scroll) {
    if (index < 0 || index >= pieces.length) return;
    if (current >= 0) pieces[current].classList.remove("on");
    current = index;
    pieces[current].classList.add("on");
    detail.hidden = false;
    detail.textContent = describe(current);
    if (scroll) pieces[current].scrollIntoView({ block: "nearest" });
  }

  function nextKept(step) {
    const kept = data.views[view].kept;
    for (let index = current + step; index >= 0 && index < pieces.length; index += step) {
      if (kept[index] !== "0") return index;
    }
    return current;
  }

  function show(key) {
    view = key;
    const { levels, kept } = data.views[view];
    const needle = data.classes.indexOf("needle");
    pieces.forEach((piece, index) => {
      const mark = data.class[index] === needle ? " n" : "";
      piece.className = `h${levels[index]} k${kept[index]}${mark}`;
    });
    for (const section of document.querySelectorAll(".view")) {
      section.hidden = section.id !== `view-${view}`;
    }
    if (current >= 0) select(current, false);
  }

  function onPoint(event) {
    const index = places.get(event.target);
    if (index !== undefined) select(index, false);
  }

  text.addEventListener("mouseover", onPoint);
  text.addEventListener("click", onPoint);
  text.addEventListener("focus", () => { if (current < 0) select(0, false); });
  text.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const targets = {
      ArrowRight: () => current + 1,
      ArrowLeft: () => current - 1,
      Home: () => 0,
      End: () => pieces.length - 1,
      k: () => nextKept(1),
      K: () => nextKept(-1),
    };
    const target = targets[event.key];
    if (!target) return;
    event.preventDefault();
    select(target(), true);
  });
  choices.addEventListener("change", (event) => show(event.target.value));
  choices.hidden = false;
  show(choices.querySelector(":checked").value);
}
