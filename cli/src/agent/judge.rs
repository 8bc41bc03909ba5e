//! When a server counts as healthy: one good check may begin it, one bad check must not end it.

/// How many checks in a row it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Good ones to begin.
    pub(crate) good: u32,
    /// Bad ones to end.
    pub(crate) bad: u32,
}

/// Judges a server by its checks. It is not healthy before it has shown that it is.
#[derive(Clone, Debug)]
pub(crate) struct Judge {
    limits: Limits,
    healthy: bool,
    /// How many checks in a row spoke against what it counts as.
    streak: u32,
}

impl Judge {
    /// Begins to judge.
    pub(crate) const fn new(limits: Limits) -> Self {
        Self { limits, healthy: false, streak: 0 }
    }

    /// Begins to judge a server that counts as healthy until it has shown that it is not.
    pub(crate) const fn healthy(limits: Limits) -> Self {
        Self { healthy: true, ..Self::new(limits) }
    }

    /// Hears how a check went, and says whether the server counts as healthy.
    pub(crate) fn hear(&mut self, good: bool) -> bool {
        if good == self.healthy {
            self.streak = 0;
            return self.healthy;
        }
        self.streak += 1;
        let enough = if good { self.limits.good } else { self.limits.bad };
        if self.streak >= enough {
            self.healthy = good;
            self.streak = 0;
        }
        self.healthy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a judge says after each of these checks: `+` good, `-` bad.
    fn check(limits: Limits, checks: &str) -> String {
        let mut judge = Judge::new(limits);
        checks.chars().map(|c| if judge.hear(c == '+') { '+' } else { '-' }).collect()
    }

    #[test]
    fn it_takes_so_many_checks_in_a_row() {
        let limits = Limits { good: 1, bad: 3 };
        assert_eq!(check(limits, "-+--+---+"), "-++++++-+");
        let limits = Limits { good: 2, bad: 1 };
        assert_eq!(check(limits, "+-++-++"), "---+--+");
    }
}
