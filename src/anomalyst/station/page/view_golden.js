// Golden samples: pictures that no change may judge otherwise.
import { call } from "./api.js";
import { action, ask, h, notice } from "./dom.js";
import { goldenTable } from "./counts.js";
import { app, may, recipePath } from "./state.js";

export async function goldenView(root, { signal }) {
  root.append(
    h("h1", {}, "Golden samples"),
    h("p.muted", {}, "Judged again at every change of the recipe; a change that breaks one that held is refused."),
  );
  if (!app.recipe) return void root.append(h("p", {}, "There is no recipe yet."));
  const place = h("section.card", { "aria-label": "Samples" });
  root.append(place);
  await draw(place, signal);
}

async function draw(place, signal) {
  const samples = await call(recipePath("/golden"), { signal });
  const remove = (sample) =>
    action("Remove …", async () => {
      const sure = await ask("Remove this golden sample?", "The audit log keeps that it was one.", { confirm: "Remove" });
      if (sure === null) return;
      await call(recipePath(`/golden/${sample.id}`), { method: "DELETE" });
      notice("fine", "Removed.");
      await draw(place, signal);
    });
  const wrong = samples.filter((each) => !each.holds).length;
  const words = wrong ? `${wrong} of ${samples.length} do not hold now.` : samples.length === 1 ? "It holds now." : `All ${samples.length} hold now.`;
  place.replaceChildren(
    samples.length ? h(`p.notice.${wrong ? "bad" : "fine"}`, {}, words) : "",
    goldenTable(samples, may("engineer") ? remove : null),
    h("p.hint", {}, "To add one, open a part and press “Golden sample”."),
  );
}
