// Is the line still what it was, and does the inspection repeat itself?
import { call, withQuery } from "./api.js";
import { action, field, h, line, notice, number, percent, redraw, table, time } from "./dom.js";
import { app, may, recipePath } from "./state.js";

export async function lineView(root, { signal }) {
  root.append(h("h1", {}, "Drift and repeatability"));
  if (!app.recipe) return void root.append(h("p", {}, "There is no recipe yet."));
  const drift = h("section.card", { "aria-label": "Drift" });
  const again = h("section.card", { "aria-label": "Repeatability" });
  root.append(drift, again);
  await drawDrift(drift, signal);
  await drawRepeatability(again, signal);
}

async function drawDrift(place, signal) {
  const found = await call(withQuery(recipePath("/drift"), { category: app.category }), { signal });
  const state = found.alarm
    ? h("div.notice.bad", {}, h("p", {}, h("strong", {}, "Alarm: "), found.alarm))
    : h("p.notice.fine", {}, "No sign of a change.");
  const since = found.since ? h("p.hint", {}, "Counted since the last alarm was noted: ", time(found.since)) : null;
  redraw(
    place,
    h("h2", {}, `Drift${found.category ? `: ${found.category}` : ""}`),
    state,
    h("p.muted", {}, `${found.words.charAt(0).toUpperCase()}${found.words.slice(1)}`),
    h("div.columns", {}, meter("Scores", found.score), meter("Features (similarity to good parts)", found.features)),
    since,
    may("engineer") && noting(place, signal, found.alarm),
  );
}

function meter(title, watched) {
  if (!watched) return h("div", {}, h("h3", {}, title), h("p.muted", {}, "nothing to compare yet"));
  const share = Math.min(1, watched.evidence);
  const fill = h("i");
  fill.style.width = `${100 * share}%`;
  const label = `Evidence of a change, ${title}`;
  const bar = h(`div.meter${watched.change ? ".alarm" : ""}`, { role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * share) }, fill);
  const change = watched.change;
  const words = change
    ? h("p", {}, `${change.direction} since about `, h("a", { href: `#/part/${change.since.id}` }, time(change.since.time)), `: ${number(change.usual, 3)} before, then ${number(change.now, 3)}`)
    : h("p.small", {}, `usually ${number(watched.usual, 3)}, the newest parts ${number(watched.now, 3)}; ${watched.count} parts`);
  return h("div", {}, h("h3", {}, title), bar, h("p.small.muted", {}, `evidence ${Math.round(100 * share)} % of what gives the alarm`), words);
}

function noting(place, signal, alarm) {
  const note = h("input", { maxlength: "2000" });
  const send = action("Note it, and watch anew", async () => {
    await call(recipePath("/drift/seen"), { method: "POST", json: { note: note.value.trim() } });
    notice("fine", "Noted in the audit log; watching begins anew.");
    document.getElementById("alarm").hidden = true;
    await drawDrift(place, signal);
  });
  const row = h("div.row", {}, h("div.grow", {}, field("What was found", note, "lamp, lens, new batch …")), send);
  return alarm ? row : h("details", {}, h("summary", {}, "Was something changed on purpose?"), row);
}

async function drawRepeatability(place, signal) {
  const found = await call(recipePath("/repeatability"), { signal });
  const rows = found.parts.map((each) =>
    line(each.part_id, h("td.n", {}, each.n), h("td.n", {}, number(each.mean)), h("td.n", {}, number(each.sd, 3)), h("td.n", {}, each.flips ?? "–")),
  );
  const figure = (title, value) => h("div", {}, h("dt", {}, title), h("dd", {}, h("span.big", {}, value)));
  const words = found.words.charAt(0).toUpperCase() + found.words.slice(1);
  const made = [
    h("h2", {}, "Repeatability (GR&R)"),
    h("p.muted", {}, `${words}.`),
    found.parts.length && h(
      "dl.counts",
      {},
      figure("GR&R, of the total spread", found.grr_percent === null ? "–" : `${number(found.grr_percent, 3)} %`),
      figure("Looks with another verdict", percent(found.flip_rate)),
      figure("Spread of one part's score (sd)", number(found.repeatability_sd, 3)),
    ),
    table(["Part", "#Looks", "#Mean score", "#Spread (sd)", "#Other verdicts"], rows, { caption: "Parts seen twice or more", empty: "No part was seen twice yet: under Inspect, give the same part id to several new pictures of one part." }),
  ];
  redraw(place, ...made);
}
