//! The outcome of a contest as a picture: imbalance against churn, and imbalance over time.
//!
//! SVG by hand: two panels of points and lines need no library. Colours follow the viewer's scheme, and each policy has a
//! number at its points and a dash in its line, so that nothing rests on colour alone.

use std::fmt::Write as _;

use mandoline_sim::contest::Outcome;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 900.0;
/// Distinct for the colour-blind, on white and on black (after Paul Tol's bright and vibrant schemes).
const COLOURS: [&str; 10] = [
    "#0077bb", "#ee7733", "#228833", "#cc3311", "#33bbee", "#aa3377", "#999933", "#ee3377",
    "#009988", "#888888",
];
const DASHES: [&str; 3] = ["", "6 3", "2 3"];
/// The least churn that is told from none: one part in a million.
const CHURN_LEAST: f64 = 1e-6;
/// Where none stands, left of the scale.
const NONE_AT: f64 = LEFT + 20.0;
/// More points than this cannot be told apart in the panel's width.
const POINTS_MAX: usize = 700;

/// Draws the outcomes; the first `warmup` intervals are shaded.
pub(crate) fn svg(title: &str, outcomes: &[Outcome], warmup: usize) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"13\">\n<style>\n\
         svg {{ background: #fff; color: #222 }}\n\
         text {{ fill: currentColor }}\n\
         .axis {{ stroke: currentColor; fill: none }}\n\
         .grid {{ stroke: currentColor; opacity: .15 }}\n\
         .shade {{ fill: currentColor; opacity: .06 }}\n\
         @media (prefers-color-scheme: dark) {{ svg {{ background: #16181c; color: #ddd }} }}\n\
         </style>\n<title>{0}</title>\n<text x=\"70\" y=\"28\" font-size=\"16\">{0}</text>\n",
        escape(title)
    );
    let highest = outcomes.iter().filter_map(|outcome| outcome.imbalance).map(|i| i.max);
    let highest = highest.fold(1.1, f64::max) * 1.05;
    let imbalance = |top: f64| Axis { least: 1.0, most: highest, from: top + 320.0, to: top };
    against_churn(&mut svg, outcomes, &imbalance(60.0));
    over_time(&mut svg, outcomes, warmup, &imbalance(470.0));
    legend(&mut svg, outcomes);
    svg.push_str("</svg>\n");
    svg
}

/// A scale by orders of magnitude.
struct Axis {
    least: f64,
    most: f64,
    from: f64,
    to: f64,
}

impl Axis {
    fn at(&self, value: f64) -> f64 {
        let share = (value.max(self.least) / self.least).ln() / (self.most / self.least).ln();
        self.from + (self.to - self.from) * share.min(1.0)
    }

    /// Values of 1, 2 and 5 times powers of ten within the scale; closer ones where it spans less than that.
    fn ticks(&self) -> Vec<f64> {
        let steps: &[f64] = match self.most / self.least {
            ..1.5 => &[1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4, 1.45],
            ..5.0 => &[1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
            ..2_000.0 => &[1.0, 2.0, 5.0],
            _ => &[1.0],
        };
        let powers = self.least.log10().floor() as i32..=self.most.log10().ceil() as i32;
        let all = powers.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
        all.filter(|tick| (self.least * 0.999..=self.most).contains(tick)).collect()
    }
}

const LEFT: f64 = 70.0;
const RIGHT: f64 = 740.0;

fn frame(svg: &mut String, y: &Axis, caption: &str) {
    for tick in y.ticks() {
        let at = y.at(tick);
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            at + 4.0,
            short(tick)
        );
    }
    let middle = (y.from + y.to) / 2.0;
    let _ = writeln!(
        svg,
        "<path class=\"axis\" d=\"M{LEFT} {} V{} H{RIGHT}\"/>\
         <text x=\"18\" y=\"{middle}\" text-anchor=\"middle\" transform=\"rotate(-90 18 {middle})\">\
         busiest task / mean</text>\
         <text x=\"{:.0}\" y=\"{}\" text-anchor=\"middle\">{caption}</text>",
        y.to,
        y.from,
        (LEFT + RIGHT) / 2.0,
        y.from + 42.0
    );
}

fn against_churn(svg: &mut String, outcomes: &[Outcome], y: &Axis) {
    let churns = || outcomes.iter().map(|outcome| outcome.load_churn);
    let least = churns().filter(|churn| *churn >= CHURN_LEAST).fold(1e-3, f64::min);
    let least = 10f64.powf(least.log10().floor());
    let most = (churns().fold(1e-2, f64::max) * 1.5).min(1.0);
    let x = Axis { least, most, from: LEFT + 60.0, to: RIGHT };
    let x_of = |churn: f64| if churn < CHURN_LEAST { NONE_AT } else { x.at(churn) };
    frame(svg, y, "load that changes tasks in an interval (mean), and imbalance: p50 (dot) to p99");
    let ticks =
        x.ticks().into_iter().map(|tick| (x.at(tick), format!("{} %", short(tick * 100.0))));
    for (at, label) in [(NONE_AT, "none".to_owned())].into_iter().chain(ticks) {
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{}\" y2=\"{}\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>",
            y.from,
            y.to,
            y.from + 18.0
        );
    }
    for (number, outcome) in outcomes.iter().enumerate() {
        let Some(imbalance) = outcome.imbalance else { continue };
        let (at, colour) = (x_of(outcome.load_churn), colour(number));
        let (half, tail) = (y.at(imbalance.p50), y.at(imbalance.p99));
        let _ = writeln!(
            svg,
            "<g stroke=\"{colour}\" fill=\"{colour}\"><title>{name}: p50 {:.3}, p99 {:.3}, churn {:.4} %</title>\
             <line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{half:.1}\" y2=\"{tail:.1}\" stroke-width=\"2\"/>\
             <line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{tail:.1}\" y2=\"{tail:.1}\" stroke-width=\"2\"/>\
             <circle cx=\"{at:.1}\" cy=\"{half:.1}\" r=\"5\"/></g>\
             <text x=\"{:.1}\" y=\"{:.1}\" font-size=\"11\">{}</text>",
            imbalance.p50,
            imbalance.p99,
            outcome.load_churn * 100.0,
            at - 4.0,
            at + 4.0,
            // To the left and right in turn, for neighbours.
            at + if number.is_multiple_of(2) { 8.0 } else { -16.0 },
            half + 4.0,
            number + 1,
            name = escape(&outcome.policy),
        );
    }
}

fn over_time(svg: &mut String, outcomes: &[Outcome], warmup: usize, y: &Axis) {
    let first = outcomes.first().and_then(|outcome| outcome.series.first()).map(|point| point.seed);
    let last =
        outcomes.iter().flat_map(|outcome| &outcome.series).map(|point| point.interval).max();
    let last = last.unwrap_or(0).max(1) as f64;
    let x = |interval: usize| LEFT + (RIGHT - LEFT) * interval as f64 / last;
    let _ = writeln!(
        svg,
        "<rect class=\"shade\" x=\"{LEFT}\" y=\"{}\" width=\"{:.1}\" height=\"{}\"/>",
        y.to,
        x(warmup.min(last as usize)) - LEFT,
        y.from - y.to
    );
    frame(svg, y, "interval (the shaded ones are for warming up; the first seed)");
    for quarter in 0..=4 {
        let interval = (last * f64::from(quarter) / 4.0).round() as usize;
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{interval}</text>",
            x(interval),
            y.from + 18.0
        );
    }
    for (number, outcome) in outcomes.iter().enumerate() {
        let points: Vec<(usize, f64)> = outcome
            .series
            .iter()
            .filter(|point| Some(point.seed) == first)
            .filter_map(|point| Some((point.interval, point.imbalance?)))
            .collect();
        // Of points that would share a place the highest is drawn.
        let together = points.len().div_ceil(POINTS_MAX).max(1);
        let highest = |some: &[(usize, f64)]| {
            some.iter().copied().max_by(|a, b| a.1.total_cmp(&b.1)).expect("chunks are not empty")
        };
        let mut path = String::new();
        for (interval, value) in points.chunks(together).map(highest) {
            let _ = write!(path, "{:.1},{:.1} ", x(interval), y.at(value));
        }
        let _ = writeln!(
            svg,
            "<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"1.6\" stroke-dasharray=\"{}\" points=\"{}\">\
             <title>{}</title></polyline>",
            colour(number),
            dash(number),
            path.trim_end(),
            escape(&outcome.policy)
        );
    }
}

fn legend(svg: &mut String, outcomes: &[Outcome]) {
    for (number, outcome) in outcomes.iter().enumerate() {
        let y = 70.0 + 22.0 * number as f64;
        let _ = writeln!(
            svg,
            "<line x1=\"764\" x2=\"796\" y1=\"{y}\" y2=\"{y}\" stroke=\"{0}\" stroke-width=\"2\" \
             stroke-dasharray=\"{1}\"/><circle cx=\"780\" cy=\"{y}\" r=\"4\" fill=\"{0}\"/>\
             <text x=\"804\" y=\"{2}\">{4}. {3}</text>",
            colour(number),
            dash(number),
            y + 4.0,
            escape(&outcome.policy),
            number + 1
        );
    }
}

fn colour(number: usize) -> &'static str {
    COLOURS[number % COLOURS.len()]
}

fn dash(number: usize) -> &'static str {
    DASHES[number % DASHES.len()]
}

/// A number without the zeros at its end.
fn short(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use mandoline_sim::contest::Point;
    use mandoline_sim::percentile::Percentiles;

    use super::*;

    fn outcome(policy: &str, imbalance: f64, churn: f64) -> Outcome {
        let point = |interval| Point {
            seed: 1,
            interval,
            imbalance: (interval != 3).then_some(imbalance),
            load_churn: churn,
            key_churn: 0.0,
            forced_churn: 0.0,
            moves: 0,
            plan_ms: 0.0,
            slices: 1,
            unserved: 0.0,
        };
        Outcome {
            policy: policy.to_owned(),
            imbalance: Percentiles::of(vec![imbalance]),
            load_churn: churn,
            key_churn: 0.0,
            forced_churn: 0.0,
            moves: 0,
            plan_ms: None,
            slices: 1,
            unserved: 0.0,
            series: (0..5_000).map(point).collect(),
        }
    }

    #[test]
    fn every_policy_is_drawn_and_every_number_is_one() {
        for (imbalance, churn) in [(1.0, 0.0), (1.2, 1e-5), (3.0, 0.5), (1_000.0, 1.0)] {
            let outcomes = [outcome("a<b>", imbalance, churn), outcome("c", 1.0, 0.0)];
            let svg = svg("t & t", &outcomes, 10);
            assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"), "{svg}");
            assert!(svg.contains("t &amp; t") && svg.contains("a&lt;b&gt;"), "{svg}");
            assert_eq!(svg.matches("<polyline").count(), 2);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert!(svg.len() < 100_000, "{}", svg.len());
        }
    }

    #[test]
    fn nothing_at_all_is_an_empty_frame() {
        assert!(svg("", &[], 1).contains("</svg>"));
    }

    #[test]
    fn ticks_lie_within_the_scale() {
        let scales = [(1.0, 1.15), (1.0, 4.0), (1.0, 300.0), (1e-6, 0.3)];
        for (least, most) in scales {
            let ticks = Axis { least, most, from: 0.0, to: 1.0 }.ticks();
            assert!((2..=12).contains(&ticks.len()), "{ticks:?}");
        }
    }
}
