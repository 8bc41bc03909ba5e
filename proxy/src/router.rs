//! What a proxy is given to route a job's requests by.

use mandoline::{Clerk, Generation};
use mandoline_core::name::JobName;

use crate::metrics::stats::Known;

/// What all workers route a job's requests by: the job's clerk.
#[derive(Clone, Debug)]
pub struct Router {
    clerk: Clerk,
}

impl Router {
    /// Routes by what a clerk knows.
    pub const fn new(clerk: Clerk) -> Self {
        Self { clerk }
    }

    /// Says for which job.
    pub fn job(&self) -> &JobName {
        self.clerk.job()
    }

    pub(crate) const fn clerk(&self) -> &Clerk {
        &self.clerk
    }

    /// Says whether it goes by the same clerk as another.
    pub fn is(&self, other: &Self) -> bool {
        self.clerk.is(&other.clerk)
    }

    /// Says by which generation keys are routed, and how many tasks are avoided.
    pub(crate) fn known(&self) -> Known {
        Known {
            job: self.job().clone(),
            generation: self.generation(),
            avoided: self.clerk.avoided().len(),
        }
    }

    /// Gives the generation that keys are routed by, zero before the first.
    pub(crate) fn generation(&self) -> Generation {
        self.clerk.assignment().map_or(Generation::ZERO, |assignment| assignment.generation)
    }
}
