//! What the rounds say: a median for each contender, and for two of them the median of their ratios within a round.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Value};

use crate::bench::proxy::peers::Contender;

/// Microseconds of processor time a request, for each contender, of each round.
#[derive(Debug, Default)]
pub(crate) struct Rounds(pub(crate) Vec<BTreeMap<Contender, f64>>);

/// What is compared, and what it should be at most.
const RATIOS: [(&str, Contender, Contender, Option<f64>); 9] = [
    ("bare_ratio_haproxy_map", Contender::Bare, Contender::HaproxyMap, Some(1.0)),
    ("bare_ratio_haproxy", Contender::Bare, Contender::Haproxy, Some(1.07)),
    ("bare_ratio_nginx", Contender::Bare, Contender::Nginx, None),
    ("full_ratio_nginx_lua", Contender::Full, Contender::NginxLua, Some(1.0)),
    ("full_ratio_haproxy_map", Contender::Full, Contender::HaproxyMap, None),
    ("full_ratio_bare", Contender::Full, Contender::Bare, None),
    ("grpc_ratio_nginx", Contender::Grpc, Contender::NginxGrpc, Some(1.0)),
    ("grpc_ratio_haproxy", Contender::Grpc, Contender::HaproxyGrpc, None),
    ("bare_ratio_other", Contender::Bare, Contender::Other, None),
];

impl Rounds {
    fn cost(&self, of: Contender) -> Option<f64> {
        median(self.0.iter().filter_map(|round| round.get(&of).copied()).collect())
    }

    /// Gives the ratios of each round, in order.
    fn ratio(&self, one: Contender, other: Contender) -> Vec<f64> {
        let of = |round: &BTreeMap<_, f64>| Some(round.get(&one)? / round.get(&other)?);
        let mut all: Vec<f64> = self.0.iter().filter_map(of).collect();
        all.sort_unstable_by(f64::total_cmp);
        all
    }

    /// Says it all for people.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for contender in Contender::ALL {
            let Some(cost) = self.cost(contender) else { continue };
            writeln!(text, "{contender:<14} {cost:>6.2} us a request").expect("a string takes it");
        }
        for (name, one, other, goal) in RATIOS {
            let all = self.ratio(one, other);
            let (Some(least), Some(most)) = (all.first().copied(), all.last().copied()) else {
                continue;
            };
            let middle = median(all).expect("it has a first");
            let goal = goal.map_or_else(String::new, |goal| format!(", goal {goal}"));
            writeln!(text, "{name:<24} {middle:.3} (from {least:.3} to {most:.3}{goal})")
                .expect("a string takes it");
        }
        text
    }

    /// Says it all for programs. What was not measured is null.
    pub(crate) fn json(&self) -> Map<String, Value> {
        let mut object = Map::new();
        let costs =
            Contender::ALL.iter().filter_map(|one| Some((one.to_string(), self.cost(*one)?)));
        object.insert(
            "cpu_us".to_owned(),
            costs.map(|(name, cost)| (name, Value::from(cost))).collect(),
        );
        for (name, one, other, _) in RATIOS {
            let ratio = median(self.ratio(one, other));
            object.insert(name.to_owned(), ratio.map_or(Value::Null, Value::from));
        }
        object.insert("rounds".to_owned(), self.0.len().into());
        object
    }
}

/// Says what a round found.
pub(crate) fn line(round: &BTreeMap<Contender, f64>) -> String {
    let each = round.iter().map(|(contender, cost)| format!("{contender} {cost:.1}"));
    each.collect::<Vec<_>>().join(", ")
}

/// Gives the middle one, or the mean of the two there.
pub(crate) fn median(mut of: Vec<f64>) -> Option<f64> {
    of.sort_unstable_by(f64::total_cmp);
    let middle = of.len() / 2;
    match of.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(of[middle]),
        _ => Some((of[middle - 1] + of[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_paired_within_its_round() {
        let round =
            |bare, map| BTreeMap::from([(Contender::Bare, bare), (Contender::HaproxyMap, map)]);
        // The machine got four times as slow, and both with it.
        let rounds = Rounds(vec![round(10.0, 20.0), round(20.0, 40.0), round(40.0, 60.0)]);
        let object = rounds.json();
        assert_eq!(object["bare_ratio_haproxy_map"], 0.5);
        assert_eq!(object["cpu_us"]["bare"], 20.0);
        assert_eq!(object["grpc_ratio_nginx"], Value::Null);
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(median(vec![3.0, 1.0]), Some(2.0));
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![]), None);
    }
}
