//! The sections of a proxy's configuration file that have no flag of their own: routes, jobs, time-outs and limits. What is left out
//! has its default; what is not known is refused, with its line and what was probably meant.

pub(crate) mod bounds;
pub(crate) mod forwarded;
pub(crate) mod job;
pub(crate) mod listener;
pub(crate) mod observe;
pub(crate) mod route;
