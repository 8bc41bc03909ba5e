//! One kind of load that is kept even: what each part weighs, what each holder carries, and how much is too much.
//!
//! The first meter is the job's load; further ones, such as memory, are the application's. Holders are compared by
//! pressure: what an ordinary task would carry to be as busy.

use std::collections::BTreeSet;

use crate::spec::Ratio;

/// `value * times / over`, saturating.
pub(in crate::balance) fn scale(value: u64, times: u64, over: u64) -> u64 {
    u64::try_from(u128::from(value) * u128::from(times) / u128::from(over.max(1)))
        .unwrap_or(u64::MAX)
}

/// The pressures between which holders are kept.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::balance) struct Marks {
    /// Where all would be, were the load spread perfectly.
    pub(in crate::balance) mean: u64,
    /// Above it a holder has too much.
    pub(in crate::balance) limit: u64,
    /// A holder that has too much gives until it is down here.
    pub(in crate::balance) give_to: u64,
    /// A holder takes until it is up here.
    pub(in crate::balance) take_to: u64,
    /// Below it a holder has too little.
    pub(in crate::balance) floor: u64,
    /// A holder that has too little is filled up to here.
    pub(in crate::balance) fill_to: u64,
}

/// One kind of load.
#[derive(Debug, Default)]
pub(in crate::balance) struct Meter {
    pub(in crate::balance) marks: Marks,
    /// What each part weighs, all replicas together.
    pub(in crate::balance) weight: Vec<u64>,
    /// What each holder carries.
    pub(in crate::balance) held: Vec<u64>,
    /// Thousandths of an ordinary task, and zero for a holder that may not be given anything.
    capacity: Vec<u64>,
    /// Serving holders by pressure, once somebody asked for it.
    order: Option<BTreeSet<(u64, u32)>>,
    detached: Option<u32>,
}

impl Meter {
    pub(in crate::balance) fn new(weight: Vec<u64>, held: Vec<u64>, capacity: Vec<u64>) -> Self {
        Self { marks: Marks::default(), weight, held, capacity, order: None, detached: None }
    }

    /// The weight that an ordinary task would carry to be as busy.
    pub(in crate::balance) fn pressure(&self, holder: u32) -> u64 {
        let (held, capacity) = (self.held[holder as usize], self.capacity[holder as usize]);
        if capacity == ORDINARY { held } else { scale(held, ORDINARY, capacity) }
    }

    /// The weight that brings a holder to a pressure.
    pub(in crate::balance) fn weight_at(&self, holder: u32, pressure: u64) -> u64 {
        let capacity = self.capacity[holder as usize];
        if capacity == ORDINARY { pressure } else { scale(pressure, capacity, ORDINARY) }
    }

    /// What a holder may take before it reaches a pressure.
    pub(in crate::balance) fn room(&self, holder: u32, pressure: u64) -> u64 {
        self.weight_at(holder, pressure).saturating_sub(self.held[holder as usize])
    }

    /// What a holder has above a pressure.
    pub(in crate::balance) fn above(&self, holder: u32, pressure: u64) -> u64 {
        self.held[holder as usize].saturating_sub(self.weight_at(holder, pressure))
    }

    pub(in crate::balance) fn add(&mut self, holder: u32, weight: u64) {
        self.set(holder, self.held[holder as usize].saturating_add(weight));
    }

    pub(in crate::balance) fn take(&mut self, holder: u32, weight: u64) {
        self.set(holder, self.held[holder as usize].saturating_sub(weight));
    }

    fn set(&mut self, holder: u32, held: u64) {
        let before = self.pressure(holder);
        self.held[holder as usize] = held;
        let after = self.pressure(holder);
        if let Some(order) = &mut self.order
            && self.capacity[holder as usize] > 0
            && self.detached != Some(holder)
        {
            order.remove(&(before, holder));
            order.insert((after, holder));
        }
    }

    /// Serving holders by pressure, the least pressed first.
    pub(in crate::balance) fn order(&mut self) -> &BTreeSet<(u64, u32)> {
        if self.order.is_none() {
            let holders = 0..self.held.len() as u32;
            let serving = holders.filter(|holder| self.capacity[*holder as usize] > 0);
            self.order = Some(serving.map(|holder| (self.pressure(holder), holder)).collect());
        }
        self.order.as_ref().expect("it was just made")
    }

    /// Takes a holder out of the order while much of what it has goes, so that its place is not looked for each time.
    pub(in crate::balance) fn detach(&mut self, holder: u32) {
        let pressure = self.pressure(holder);
        if let Some(order) = &mut self.order {
            order.remove(&(pressure, holder));
            self.detached = Some(holder);
        }
    }

    /// Puts the holder that was taken out back to its place.
    pub(in crate::balance) fn attach(&mut self) {
        if let Some(holder) = self.detached.take() {
            let pressure = self.pressure(holder);
            self.order.as_mut().expect("it was taken out of it").insert((pressure, holder));
        }
    }

    /// The same for who has asked for it before.
    pub(in crate::balance) fn ordered(&self) -> impl DoubleEndedIterator<Item = (u64, u32)> {
        self.order.iter().flatten().copied()
    }

    /// Sums what the serving holders can carry, in thousandths of an ordinary task.
    pub(in crate::balance) fn capacity(&self) -> u64 {
        self.capacity.iter().sum()
    }

    /// Finds the greatest pressure among serving holders.
    pub(in crate::balance) fn peak(&self) -> u64 {
        let holders = 0..self.held.len() as u32;
        let serving = holders.filter(|holder| self.capacity[*holder as usize] > 0);
        serving.map(|holder| self.pressure(holder)).max().unwrap_or(0)
    }

    /// Finds the least pressure among serving holders.
    pub(in crate::balance) fn trough(&self) -> u64 {
        let holders = 0..self.held.len() as u32;
        let serving = holders.filter(|holder| self.capacity[*holder as usize] > 0);
        serving.map(|holder| self.pressure(holder)).min().unwrap_or(0)
    }
}

impl Marks {
    /// Marks round a mean: a band of this width above it, and where giving and taking stop within that.
    pub(in crate::balance) fn above(mean: u64, width: u64, give_to: Ratio, take_to: Ratio) -> Self {
        let at = |share: Ratio| mean.saturating_add(share.of(width));
        Self {
            mean,
            limit: mean.saturating_add(width),
            give_to: at(give_to),
            take_to: at(take_to),
            floor: 0,
            fill_to: 0,
        }
    }
}

/// The capacity of an ordinary task, in thousandths.
const ORDINARY: u64 = 1_000;
