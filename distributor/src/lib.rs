//! Serves Mandoline's assignments to watchers, and follows whoever knows them.
